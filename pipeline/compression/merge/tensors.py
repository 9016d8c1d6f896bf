"""The tensors of a network after its channel groups went through their projections."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.compression.group import Axis, ChannelGroup
from pipeline.compression.merge.norms import merge_norms, repaired_variances
from pipeline.compression.merge.projection import Projection, Sums, along, weighted_sum, wide_dtype


def compressed_tensors(
    tensors: Mapping[str, Tensor],
    groups: Iterable[ChannelGroup],
    projections: Iterable[Projection],
    norm_scale: bool = True,
    reads: bool = True,
    approximate_repair: bool = False,
) -> dict[str, Tensor]:
    """The tensors that change, by name, in their new shapes. `tensors` is not written to.

    reads: False leaves the readers' inputs as they are. norm_scale, approximate_repair: see `modules.apply`.
    """
    work = [(g, p) for g, p in zip(groups, projections, strict=True) if not p.is_identity]
    edits: dict[str, dict[int, list[_Edit]]] = defaultdict(lambda: defaultdict(list))
    for group, projection in work:
        merges = projection.chosen is None and bool(projection.counts.max() > 1)
        values, factors = merge_norms(group, projection, tensors) if norm_scale and merges else ({}, {})
        if approximate_repair and merges:
            values |= repaired_variances(group, projection, tensors, norm_scale)
        for axis in group.writes:
            edit = _Edit(axis, projection, True, values.get(axis.tensor), factors.get(axis.tensor))
            edits[axis.tensor][axis.axis].append(edit)
        temperature = (len(projection.counts) / group.size) ** group.temperature
        for axis in group.reads if reads else ():
            scale = temperature if axis.query else 1.0
            edits[axis.tensor][axis.axis].append(_Edit(axis, projection, False, scale=scale))
    merges_of: dict[Any, Merge] = {}
    # One tensor after the other, so that the memory of one that is merged along one axis serves the next.
    return {name: _merged(tensors[name], of_tensor, merges_of) for name, of_tensor in edits.items()}


def merged_inputs(
    inputs: Tensor, reader: str, groups: Iterable[ChannelGroup], projections: Iterable[Projection]
) -> Tensor:
    """Cluster means of a reader's inputs, (rows, inputs) -> (rows, inputs left)."""
    pairs = zip(groups, projections, strict=True)
    edits = [_Edit(axis, p, True) for g, p in pairs for axis in g.reads if axis.tensor == reader and not p.is_identity]
    return _edited(inputs, 1, edits, {})


@dataclass(frozen=True)
class _Edit:
    """The change of one group's channels along one axis of a tensor.

    values: (k, ...), in place of the cluster means
    factors: (C,), by which written channels are multiplied to be added up in place of the cluster means
    scale: by which the cluster sums of read channels are multiplied
    """

    axis: Axis
    projection: Projection
    is_write: bool
    values: Tensor | None = None
    factors: Tensor | None = None
    scale: float = 1.0


def _merged(tensor: Tensor, edits: Mapping[int, Sequence[_Edit]], known: dict[Any, "Merge"]) -> Tensor:
    """The tensor with these edits, by dimension; written axes go before those that are only read."""
    for dim, of_axis in sorted(edits.items(), key=lambda item: not any(edit.is_write for edit in item[1])):
        tensor = _edited(tensor, dim, of_axis, known)
    return tensor.contiguous()


def _edited(tensor: Tensor, dim: int, edits: Sequence[_Edit], known: dict[Any, "Merge"]) -> Tensor:
    """The tensor with these edits along `dim`, done as one projection of the whole axis.

    All groups of one axis go at once: the heads of a layer, and keys beside queries, share a weight.
    known: a cache of `_merge_of`: a weight, its bias and the norm behind it merge alike.
    """
    size = tensor.shape[dim]
    first = edits[0]
    if first.values is not None and first.axis.is_plain and first.axis.index.shape[0] == size:
        # Nothing else stands there.
        return first.values.to(tensor.device, wide_dtype(tensor)).movedim(0, dim).to(tensor.dtype)
    key = (size, *((_places(e.axis), id(e.projection), e.is_write, id(e.factors), e.scale) for e in edits))
    if key not in known:
        known[key] = _merge_of(size, edits)
    sums, divisor, weights = known[key]
    merged = weighted_sum(tensor, sums, weights, dim)
    if len(divisor):
        merged /= divisor.to(tensor.device, merged.dtype).view(along(dim, tensor))
    for edit in edits:
        if edit.values is not None:
            entries = edit.axis.index[edit.projection.representatives].reshape(-1)
            places = torch.searchsorted(sums.stays, entries)
            merged.index_copy_(dim, places.to(tensor.device), edit.values.to(merged).movedim(0, dim))
    return merged.to(tensor.dtype)


# The sums of an axis, the divisor of each (empty where all are 1), and the weight of each entry (None: 1 for all).
Merge = tuple[Sums, Tensor, Tensor | None]


def _places(axis: Axis) -> int | bytes:
    """A value that two axes have in common where their channels stand at the same entries."""
    return len(axis.index) if axis.is_plain else axis.index.numpy().tobytes()


def _is_usual(edit: _Edit) -> bool:
    """Do single entries go through a plain mean or sum?"""
    return edit.axis.is_plain and edit.scale == 1 and edit.projection.chosen is None and edit.projection.scales is None


def _merge_of(size: int, edits: Sequence[_Edit]) -> Merge:
    """The merge of an axis with these edits."""
    if len(edits) == 1 and _is_usual(edit := edits[0]) and len(edit.axis.index) == size:
        counts = edit.projection.counts
        divides = edit.is_write and edit.factors is None and bool(counts.max() > 1)
        return edit.projection.sums, counts.double() if divides else torch.empty(0), edit.factors
    into = torch.arange(size)  # for each position: the position that it is added to, -1 where it is dropped
    divisor, weights = torch.ones(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    for edit in edits:
        projection, index = edit.projection, edit.axis.index
        where, first = projection.into, index[projection.representatives]
        if edit.is_write and projection.chosen is not None:  # the representative alone writes
            where = torch.where(where == torch.arange(len(where)), where, -1)
        into[index] = torch.where(where[:, None] >= 0, index[where], -1)
        if not edit.is_write:
            divisor[first] = 1 / edit.scale
            weights[index] = 1.0 if projection.scales is None else projection.scales.double()[:, None]
        elif edit.factors is not None:
            weights[index] = edit.factors.cpu()[:, None]
        elif projection.chosen is None:
            divisor[first] = projection.counts[:, None].double()
    sums = Sums.of(into)
    divisor = divisor[sums.stays]
    scaled = bool((weights != 1).any())
    return sums, divisor if (divisor != 1).any() else divisor[:0], weights if scaled else None
