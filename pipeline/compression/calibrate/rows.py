"""Rows of layer inputs that calibration looks at: at most ROWS a layer, drawn from all batches as if they were one.

A survey, forward passes of a few samples, counts all rows before the first batch, so that only drawn rows are kept.
"""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compression.calibrate.batches import Batches, cut
from pipeline.compression.calibrate.lockstep import Done, Stop, forward, watched
from pipeline.example import Example
from pipeline.tables import UserError

ROWS = 8192  # pixels or tokens of a layer, at most
FEW = 3  # samples of a survey: rows are counted at FEW and at FEW - 1 samples, and lie on a straight line
# Convolutions that pad inside their forward (timm's Conv2dSame) see other patches than their attributes say.
PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Survey(NamedTuple):
    """Layers and rows that a pass over the batches will meet.

    order: the layers that every forward calls once, in the order of the calls
    inputs: {layer: rows of its input}
    patches: {layer: pixels of its output}, for layers that see patches (`sees_patches`)
    """

    order: list[str]
    inputs: dict[str, "Rows"]
    patches: dict[str, "Rows"]


class Rows(NamedTuple):
    """How many rows there are in each batch, and how many of all are drawn at most."""

    counts: tuple[int, ...]
    most: int

    @property
    def whole(self) -> bool:
        """Are all rows drawn? Then each stands where it stood."""
        return sum(self.counts) <= self.most


class Call(NamedTuple):
    """One call of a layer in a survey. inputs: rows of its input; patches: pixels of its output."""

    name: str
    layer: nn.Module
    inputs: int
    patches: int


def surveyed(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, limit: int = ROWS) -> Survey:
    """The survey of a model: two forward passes of a few samples for every shape of samples in the batches.

    limit: rows that are drawn of a layer, at most.
    Layers that are called twice are left out, for no one weight or statistic is right for both calls.
    """
    most: dict[tuple, int] = {}
    for one in batches.outlines:
        most[one.shapes] = max(one.samples, most.get(one.shapes, 0))
    met: dict[tuple, tuple[int, list[Call], list[Call]]] = {}
    for batch, one in zip(batches, batches.outlines, strict=True):
        if one.shapes not in met and one.samples == most[one.shapes]:
            few = min(FEW, one.samples)
            fewer = calls(model, layers, cut(batch, 0, few - 1)) if few > 1 else []
            met[one.shapes] = few, fewer, calls(model, layers, cut(batch, 0, few), len(fewer))
        if len(met) == len(most):
            break
    kinds = [found for _, _, found in met.values()]
    single = [{id(layer) for layer, n in Counter(call.layer for call in kind).items() if n == 1} for kind in kinds]
    order = [call.name for call in kinds[0] if all(id(call.layer) in of_kind for of_kind in single)]

    def expected(name: str, what: str) -> Rows:
        counts = []
        for one in batches.outlines:
            few, *pair = met[one.shapes]
            # Some rows come from no sample, such as those of a position bias: their number is the same in every batch.
            less, more = (sum(getattr(call, what) for call in found if call.name == name) for found in pair)
            counts.append(more + (one.samples - few) * (more - less))
        return Rows(tuple(counts), limit)

    inputs, patches = ({name: expected(name, what) for name in order} for what in ("inputs", "patches"))
    return Survey(order, inputs, {name: rows for name, rows in patches.items() if any(rows.counts)})


def calls(model: nn.Module, layers: Mapping[str, nn.Module], example: Example, enough: int = 0) -> list[Call]:
    """The calls of these layers in one forward pass, which ends when there are enough of them; 0: at its own end."""
    found: list[Call] = []

    def note(stop: Stop) -> None:
        name, layer, x = stop.name, stop.layer, stop.x
        inputs = x.numel() // x.shape[channel_dim(layer)] if input_dim(layer) is not None else 0
        found.append(Call(name, layer, inputs, patches_in(layer, x) if sees_patches(layer) else 0))
        if len(found) == enough:
            raise Done

    with watched(layers, note):
        forward(model, example)
    return found


def input_dim(layer: nn.Module) -> int | None:
    """The dimension of a layer's weight along which its inputs stand; None: no layer whose readers can be solved."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups > 1:
            return None
        return 0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
    if isinstance(layer, nn.Linear):
        return 1
    return 0 if hasattr(layer, "nf") else None  # Conv1D of Hugging Face's GPT-2, a linear layer transposed


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's input, counted from behind, along which its channels stand."""
    return -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1


def sees_patches(layer: Any) -> bool:
    """Is it a convolution whose output pixels are not the input pixels, one for one?"""
    return type(layer).forward in PLAIN and max(*layer.kernel_size, *layer.stride) > 1


def rows_of(layer: nn.Module, x: Tensor, there: Rows, i: int) -> Tensor:
    """The rows drawn from a layer's input in batch i, (rows, inputs)."""
    rows = x.movedim(channel_dim(layer), -1)
    rows = rows.reshape(-1, rows.shape[-1])
    check_rows(layer, len(rows), there.counts[i])
    return wide(rows if there.whole else rows[picked(there, i)[1].to(x.device)])


def patches_of(layer: Any, x: Tensor, there: Rows, i: int) -> Tensor:
    """The patches of the output pixels drawn from batch i, (rows, inputs x taps)."""
    places = windows(layer, x)
    shape = places.shape[: 1 + len(layer.kernel_size)]
    check_rows(layer, shape.numel(), there.counts[i])
    if there.whole:
        return wide(places.flatten(0, len(shape) - 1).flatten(1))
    return wide(places[torch.unravel_index(picked(there, i)[1].to(x.device), shape)].flatten(1))


def patches_in(layer: Any, x: Tensor) -> int:
    return windows(layer, x).shape[: 1 + len(layer.kernel_size)].numel()


def windows(layer: Any, x: Tensor) -> Tensor:
    """The patches of a convolution's input, (N, pixels of the output..., channels, taps...), as a view."""
    sides = len(layer.kernel_size)
    x = x if x.dim() == sides + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(layer._reversed_padding_repeated_twice):
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    for i, (size, stride, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + i, gap * (size - 1) + 1, stride)[..., ::gap]
    return x.movedim(1, 1 + sides)


def check_rows(layer: nn.Module, found: int, expected: int) -> None:
    """Raise UserError where a batch has another number of rows than the survey expects."""
    if found != expected:
        raise UserError(
            f"a {type(layer).__name__} gets {found} rows from a batch where {expected} were expected: calibration "
            "needs samples along the first dimension of all inputs, and layers that see as many rows of each sample"
        )


def gather_(into: dict[str, Tensor], name: str, rows: Tensor, there: Rows, i: int) -> None:
    """In place: copy the rows drawn from batch i to their places among the drawn rows of all batches.

    A copy, because a forward may change the input of a layer in place, once the layer has been called.
    """
    everything = min(sum(there.counts), there.most)
    if name not in into:
        if len(rows) == everything and there.whole:
            into[name] = rows.clone()
            return
        into[name] = rows.new_empty(everything, rows.shape[1])
    if there.whole:
        into[name][sum(there.counts[:i]) :][: len(rows)] = rows
    else:
        into[name][picked(there, i)[0].to(rows.device)] = rows


@lru_cache(maxsize=256)
def drawn(count: int, most: int) -> Tensor:
    """(most,) int64, this many of `count` rows, in no order; cached, for it takes as long as a layer."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].clone()


def picked(there: Rows, i: int) -> tuple[Tensor, Tensor]:
    """Rows drawn from batch i: their places among all drawn rows, and their places in the batch, each (n,) int64.

    For rows of which some are left out (see Rows.whole).
    """
    rows, start = drawn(sum(there.counts), there.most), sum(there.counts[:i])
    slots = ((rows >= start) & (rows < start + there.counts[i])).nonzero().squeeze(1)
    return slots, rows[slots] - start


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
