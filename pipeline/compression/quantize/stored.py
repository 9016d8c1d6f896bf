"""Weights on grids as a file holds them: packed codes, scales and zeros in place of the numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.quantize.grids import Grid, as_weight, values
from pipeline.compression.quantize.network import on_grids
from pipeline.compression.quantize.packing import packed, unpacked

PARTS = ("codes", "scale", "zero")  # tensors that stand for a weight, NAME.codes, NAME.scale and NAME.zero


def with_codes(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """(the tensors, where packed codes stand for weights on grids; {weight: facts in JSON values, see `with_weights`}).

    tensors: of the model, by name. A weight that has left its grid stays among them as it is.
    """
    grids = {name: found for name, found in on_grids(model).items() if name in tensors}
    stored = {name: tensor for name, tensor in tensors.items() if name not in grids}
    facts = {}
    for name, (grid, codes) in grids.items():
        stored |= _parts(name, packed(codes, grid.bits), grid.scale, grid.zero)
        weight = tensors[name]
        dtype = str(weight.dtype).removeprefix("torch.")
        told = {"bits": grid.bits, "group": grid.group, "dim": grid.dim}
        facts[name] = {**told, "shape": list(weight.shape), "dtype": dtype}
    return stored, facts


def with_weights(
    stored: Mapping[str, Tensor], facts: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Grid]]:
    """The inverse of `with_codes`: (the tensors, where the weights are numbers again, bit for bit; their grids).

    facts: {weight: {"bits", "group" and "dim" of its grid, its "shape" and number format "dtype"}}
    """
    tensors, grids = dict(stored), {}
    for name, of in facts.items():
        codes, scale, zero = (tensors.pop(f"{name}.{part}") for part in PARTS)
        # A copy, as safetensors returns views of the file, which would change with it.
        grids[name] = grid = Grid(of["bits"], scale.clone(), zero.clone(), of["group"], of["dim"])
        like = torch.empty(of["shape"], dtype=getattr(torch, of["dtype"]))
        matrix = unpacked(codes, grid.bits, like.numel()).view(like.shape[grid.dim], -1)
        tensors[name] = as_weight(values(grid, matrix), like, grid.dim)
    return tensors, grids


def _parts(name: str, *parts: Tensor) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
