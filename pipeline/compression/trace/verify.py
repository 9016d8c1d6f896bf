"""Proof of a trace on random weights: a group that changes the output where it must not is frozen.

Exact duplicates must fold without loss, and channels that nothing reads must drop without loss.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.compression.group import ChannelGroup, ChannelGroups, Frozen
from pipeline.compression.merge.modules import apply, named_tensors
from pipeline.compression.merge.projection import Projection
from pipeline.tables import first_line

# Above this many bytes of weights the check runs in single precision: double precision leaves no room for a copy.
LARGE = 2**26
FEW, MANY = 8, 64  # channels
DRAWS = 14, 3  # for groups of at most FEW, and of less than MANY channels; 2 for larger groups


def verified(model: nn.Module, args: tuple, kwargs: dict, traced: ChannelGroups) -> ChannelGroups:
    """Keep the groups that compress without loss where they must, freeze the others.

    The check runs on random weights, so that it tests the architecture and not this checkpoint. It also finds what the
    trace cannot: sizes that a module keeps as Python numbers, and whether attention divides its scores by a constant or
    by the width that it finds. model: a copy that this function may overwrite.
    """
    if not len(traced):
        return traced
    check = _Check(model, args, kwargs)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), plain_attention():
        try:
            check.start_()
        except Exception as error:
            return _frozen_too(traced, dict.fromkeys(range(len(traced)), f"the check fails ({first_line(error)})"))
        groups = list(traced)
        reasons: dict[int, str] = {}

        def freeze(ties: Iterable[Sequence[int]], reason: str) -> None:
            for i in (i for tie in ties for i in tie):
                cut = f"; they are cut out by {', '.join(groups[i].cut_by)}" if groups[i].cut_by else ""
                reasons[i] = reason + cut

        uneven = [tie for tie in traced.ties if len({groups[i].size for i in tie}) > 1]
        freeze(uneven, "cut into pieces of several sizes")
        everything = [tie for tie in traced.ties if tie not in uneven]

        def sort_out(ties: list[list[int]]) -> None:
            """Find the ties that fail by halving, and freeze them."""
            reason = check.failure(groups, ties)
            if reason is None:
                return
            if len(ties) == 1:
                return freeze(ties, reason)
            sort_out(ties[: len(ties) // 2])
            sort_out(ties[len(ties) // 2 :])

        if check.failure(groups, everything) is None:
            return _frozen_too(traced, reasons)
        for ties in _alike(groups, everything):
            reason = check.failure(groups, ties)
            if reason is None:
                continue
            other = [replace(g, temperature=0.5 - g.temperature) for g in groups]
            if any(a.query for tie in ties for i in tie for a in groups[i].reads) and not check.failure(other, ties):
                for i in (i for tie in ties for i in tie):
                    groups[i] = other[i]
            elif len(ties) > 1 and check.failure(groups, ties[:1]) is None:
                sort_out(ties)
            else:
                freeze(ties, reason)
        kept = [tie for tie in everything if tie[0] not in reasons]
        together = check.failure(groups, kept) if kept else None
        if together is not None:
            freeze(kept, f"together with other groups, {together}")
    return _frozen_too(ChannelGroups(tuple(groups), traced.frozen), reasons)


class _Check:
    """Random weights, noise to call the network with, and the comparison of the network with the compressed one."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.model, self.args, self.kwargs = model.cpu(), args, kwargs
        self.generator = torch.Generator().manual_seed(0)
        self.tolerance = 0.0
        self.fresh = False  # are the weights drawn and not yet written to?

    def start_(self) -> None:
        """Bring the model to a precision in which it runs, and make the noise."""
        large = sum(t.numel() * t.element_size() for t in named_tensors(self.model).values()) > LARGE
        single, double = (torch.float32, 1e-4), (torch.float64, 1e-6)
        for dtype, tolerance in (single,) if large else (double, single):
            self.model.to(dtype)
            randomise_(self.model, self.generator)
            self.args, self.kwargs = tree_map(
                lambda v, d=dtype: _noise_like(v, d, self.generator), (self.args, self.kwargs)
            )
            try:
                outputs = _tensors(self.model(*self.args, **self.kwargs))
            except RuntimeError:
                if dtype == torch.float32:
                    raise
                continue
            if all(output.isfinite().all() for output in outputs):
                self.tolerance, self.fresh = tolerance, True
                return
        raise ArithmeticError("NaN or Inf on random weights")

    def below(self, count: int) -> int:
        return int(torch.randint(max(1, count), (), generator=self.generator))

    def failure(self, groups: Sequence[ChannelGroup], ties: Sequence[Sequence[int]]) -> str | None:
        """Why the groups at these places cannot all be compressed at once, or None.

        There are several draws, as a wrong channel order may pass one by chance but hardly another. The first two leave
        successive numbers of channels: where a size must be a multiple of something, one of them fails. Every second
        draw drops channels too. Groups of at most FEW channels are drawn with every number, and more often: two layers
        that must keep the same number, though nothing flows between them, should not draw it by chance every time.
        """
        sizes = [groups[tie[0]].size for tie in ties]
        # Sizes start in the lower half, so that a large network has a small one beside it in memory.
        starts = [self.below(size // 2) for size in sizes]
        orders = [torch.randperm(size - 1, generator=self.generator).tolist() if size <= FEW else [] for size in sizes]
        for draw in range(max(DRAWS[0] if size <= FEW else DRAWS[1] if size < MANY else 2 for size in sizes)):
            if not self.fresh:
                randomise_(self.model, self.generator)
            self.fresh = False
            chosen, projections = [], []
            for tie, size, start, order in zip(ties, sizes, starts, orders, strict=True):
                if draw < 2 * len(order):
                    step = order[draw // 2]
                elif draw < 2:
                    step = start + draw
                else:
                    step = self.below(size // 2 + 1)
                left = 1 + step % (size - 1)
                for i in tie:
                    chosen.append(groups[i])
                    projections.append(Projection(mixed_labels(size, left, draw % 2 == 1, self.generator)))
            duplicate_(self.model, chosen, projections)
            drop_(self.model, chosen, projections)
            expected = _tensors(self.model(*self.args, **self.kwargs))
            try:  # the smaller network gets no name: two of them do not fit in memory beside a large one
                found = _tensors(apply(self.model, chosen, projections, share=True)(*self.args, **self.kwargs))
            except Exception as error:
                return f"the smaller network does not run ({first_line(error)})"
            for e, f in zip(expected, found, strict=True):
                if e.shape != f.shape or not torch.allclose(e, f, rtol=0, atol=self.tolerance * float(e.abs().max())):
                    return "folding duplicates and dropping what nothing reads changes the output"
        return None


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within, torch's attention layers take no fused inference path: a trace cannot see into it."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _alike(groups: Sequence[ChannelGroup], ties: Iterable[list[int]]) -> list[list[list[int]]]:
    """Lists of ties whose names differ in numbers alone: the same layer of all blocks passes or fails together."""
    found: dict[tuple[str, str], list[list[int]]] = {}
    for tie in ties:
        name = groups[tie[0]].tie or groups[tie[0]].name
        found.setdefault((re.sub(r"\d+", "*", name), groups[tie[0]].part), []).append(tie)
    return list(found.values())


def _frozen_too(traced: ChannelGroups, reasons: dict[int, str]) -> ChannelGroups:
    """Move the groups at these places to the frozen channels."""
    kept = tuple(group for i, group in enumerate(traced) if i not in reasons)
    frozen: dict[tuple[tuple[str, ...], str], int] = {}
    for i in sorted(reasons):
        names = tuple(dict.fromkeys(a.tensor for a in (*traced[i].writes, *traced[i].reads)))
        frozen[names, reasons[i]] = frozen.get((names, reasons[i]), 0) + traced[i].size
    return ChannelGroups(kept, traced.frozen + tuple(Frozen(size, *key) for key, size in frozen.items()))


def duplicate_(model: nn.Module, groups: Iterable[ChannelGroup], projections: Iterable[Projection]) -> None:
    """In place: make the channels of every cluster exact copies of its first one, in all that writes them."""
    tensors = named_tensors(model)
    with torch.no_grad():
        for group, projection in zip(groups, projections, strict=True):
            kept = projection.labels >= 0
            source = torch.arange(group.size)
            source[kept] = projection.representatives[projection.labels[kept]]
            for write in group.writes:
                tensor = tensors[write.tensor]
                copies = tensor.index_select(write.axis, write.index[source].reshape(-1).to(tensor.device))
                tensor.index_copy_(write.axis, write.index.reshape(-1).to(tensor.device), copies)


def drop_(model: nn.Module, groups: Iterable[ChannelGroup], projections: Iterable[Projection]) -> None:
    """In place: let nothing read the channels that are dropped, which is what pruning them does."""
    tensors = named_tensors(model)
    with torch.no_grad():
        for group, projection in zip(groups, projections, strict=True):
            for read in group.reads:
                tensor = tensors[read.tensor]
                tensor.index_fill_(read.axis, read.index[projection.labels < 0].reshape(-1).to(tensor.device), 0)


def mixed_labels(size: int, left: int, dropping: bool, generator: torch.Generator) -> Tensor:
    """(size,) int64: `left` clusters of very different sizes; dropping: about a third of the others are -1.

    The first channel may be dropped, too: if it always stayed, a wrong channel order could pass.
    """
    dropped = torch.randperm(size, generator=generator)[: (size - left + 2) // 3 if dropping else 0]
    stays = torch.ones(size, dtype=torch.bool)
    stays[dropped] = False
    count = int(stays.sum())
    drawn = (torch.rand(count, generator=generator) ** 2 * left).long()
    drawn[torch.randperm(count, generator=generator)[:left]] = torch.arange(left)  # none is empty
    labels = torch.full((size,), -1)
    labels[stays] = drawn
    return labels


def _noise_like(value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=dtype)
    return value.cpu() if isinstance(value, Tensor) else value


def randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Uniform weights of variance 1 / fan-in, everything else (gains, shifts, variances) uniform in [0.5, 1.5).

    Normal weights prove no more and take four times as long to draw, a second for a ViT-B.
    """
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1 and isinstance(tensor, nn.Parameter):
                bound = (3 / max(1, tensor[0].numel())) ** 0.5
                tensor.uniform_(-bound, bound, generator=generator)
            elif isinstance(tensor, nn.Parameter) or "running_" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
