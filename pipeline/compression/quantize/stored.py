"""Weights on grids as a file holds them: codes, scales and zeros in one row of bytes, and all vectors behind them.

One tensor for all, because every tensor of a safetensors file takes a hundred bytes of its header, as much as the codes
of a small layer or the shift of a norm.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.quantize.grids import Grid, as_weight, values
from pipeline.compression.quantize.network import on_grids
from pipeline.compression.quantize.packing import packed, packed_size, unpacked

PACKED = "packed_weights"  # the tensor of these bytes


def with_codes(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors, PACKED in place of weights on grids and of vectors; facts in JSON values, see `with_weights`).

    tensors: of the model, by name. A weight that has left its grid stays among them as it is, and where no weight lies
    on a grid, so do the vectors.
    """
    grids = {name: found for name, found in on_grids(model).items() if name in tensors}
    if not grids:
        return dict(tensors), {"grids": {}, "vectors": {}}
    parts, facts, vectors = [], {}, {}
    for name, (grid, codes) in grids.items():
        parts += [packed(codes, grid.bits), _bytes(grid.scale), _bytes(grid.zero)]
        told = {"bits": grid.bits, "group": grid.group, "dim": grid.dim, "scales": list(grid.scale.shape)}
        facts[name] = {**told, **_form(tensors[name])}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            parts.append(_bytes(tensor))
            vectors[name] = _form(tensor)
    stored = {name: tensor for name, tensor in tensors.items() if name not in facts and name not in vectors}
    return {**stored, PACKED: torch.cat(parts)}, {"grids": facts, "vectors": vectors}


def with_weights(stored: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Grid]]:
    """The inverse of `with_codes`: (the tensors, where the weights are numbers again, bit for bit; their grids).

    facts: {"grids": {weight: {"bits", "group" and "dim" of its grid, "scales": the shape of its scale and zero; "shape"
        and number format "dtype" of the weight}}, "vectors": {tensor: its "shape" and "dtype"}}, both in the order of
        their bytes
    """
    tensors, grids = dict(stored), {}
    left = tensors.pop(PACKED) if facts["grids"] else torch.empty(0, dtype=torch.uint8)
    for name, of in facts["grids"].items():
        like = torch.empty(of["shape"], dtype=getattr(torch, of["dtype"]))
        numbers, count = torch.promote_types(like.dtype, torch.float32), prod(of["scales"])
        sizes = [packed_size(like.numel(), of["bits"]), count * numbers.itemsize, count]
        codes, scale, zero, left = left.split([*sizes, len(left) - sum(sizes)])
        # Copies, as safetensors returns views of the file, which would change with it, and which numbers do not fit.
        scale, zero = scale.clone().view(numbers).view(of["scales"]), zero.clone().view(of["scales"])
        grids[name] = grid = Grid(of["bits"], scale, zero, of["group"], of["dim"])
        matrix = unpacked(codes, grid.bits, like.numel()).view(like.shape[grid.dim], -1)
        tensors[name] = as_weight(values(grid, matrix), like, grid.dim)
    for name, of in facts["vectors"].items():
        kind = getattr(torch, of["dtype"])
        size = prod(of["shape"]) * kind.itemsize
        own, left = left.split([size, len(left) - size])
        tensors[name] = own.clone().view(kind).view(of["shape"])
    return tensors, grids


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _form(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
