"""Block by block: the readers of a block are solved for the block's own answer to the inputs that reach it now.

A block is the smallest module that holds all layers of a channel group: the feed-forward part of a transformer's layer,
its attention, a residual block of a ResNet. Compensation then treats each block as a network of its own (see
compensate.py): the dense block and the smaller one are called with the same inputs, which are those that the blocks
before, already compressed and solved, give. SparseGPT (arXiv:2301.00774), ZipLM (arXiv:2302.04089) and FLAP
(arXiv:2312.11983) solve for the same. Errors of earlier blocks are not mended, and so nothing is fitted to chance
correlations with them; one block at a time is in memory, with the inputs of all batches.

Where the channels of one group are dropped, or stand for others unchanged, the inputs x' of a reader in the smaller
block are some of the inputs x that it has in the dense block. The least squares then need only the second moments
Σ x xᵀ of the dense block, no rows of any input; one sample through both blocks shows whether it is so.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.batches import Batches, cut
from pipeline.compression.calibrate.compensate import (
    compensate_,
    least_squares,
    matrix,
    observe,
    readers,
    second_moments,
    set_matrix_,
    target_of,
)
from pipeline.compression.calibrate.lockstep import Stop, forward, in_lockstep, watched
from pipeline.compression.calibrate.repair import kept_modes, tracked_norms
from pipeline.compression.calibrate.rows import ROWS, channel_dim, input_dim, sees_patches, surveyed, wide
from pipeline.compression.group import Axis, ChannelGroup, ChannelGroups
from pipeline.compression.merge.tensors import merged_inputs
from pipeline.compression.plan import Plan
from pipeline.example import Example

ROUNDINGS = 64  # machine epsilons by which equal inputs may differ, relative to their norm
VALUES = 2**26  # inputs that are kept of a reader of a block, 256 MB in single precision


@torch.no_grad()
def compensate_blocks_(
    smaller: nn.Module, model: nn.Module, plan: Plan, batches: Batches, ridge: float | None = None
) -> list[str]:
    """In place: solve the readers of `smaller`, block by block; returns the weights that were solved.

    smaller: the model after the plan; batches: network inputs. ridge: see `compensate_`.
    """
    changed = [i for i, projection in enumerate(plan.projections) if not projection.is_identity]
    given: dict[int, Example] = {}
    solved: list[str] = []

    def arrive(i: int, stop: Stop) -> None:
        given[i] = example_of(stop)

    def leave(path: str) -> None:
        places = [changed[i] for i in blocks[path]]
        groups = [relative(plan.groups[i], path) for i in places]
        of_block = replace(plan, groups=ChannelGroups(tuple(groups)), projections=[plan.projections[i] for i in places])
        inputs = Batches([given[i] for i in range(len(batches))])
        names = solve_block_(smaller.get_submodule(path), model.get_submodule(path), of_block, inputs, ridge)
        solved.extend(f"{path}.{name}" if path else name for name in names)

    with kept_modes(smaller):
        blocks = blocks_of(smaller.eval(), [plan.groups[i] for i in changed], batches)
        in_lockstep(smaller, {path: smaller.get_submodule(path) for path in blocks}, batches, arrive, leave)
    return solved


@torch.no_grad()
def solve_block_(
    smaller: nn.Module, dense: nn.Module, plan: Plan, inputs: Batches, ridge: float | None = None
) -> list[str]:
    """In place: solve the readers of a smaller block, so that it answers as the dense one; returns their weights.

    plan: of the groups of this block that change; inputs: of the block.
    """
    kept = kept_inputs(smaller, dense, plan, cut(next(iter(inputs)), 0, 1))
    if kept:
        moments = second_moments(dense, plan.groups, inputs)
        for name, found in moments.items():
            solve_kept_(smaller, dense, name, kept[name], found, ridge)
        return list(moments)
    rows = max(ROWS, VALUES // max(group.size for group in plan.groups))
    return compensate_(smaller, dense, plan, observe(dense, plan.groups, inputs, rows), ridge=ridge, target="same")


def kept_inputs(smaller: nn.Module, dense: nn.Module, plan: Plan, example: Example) -> dict[str, Tensor]:
    """{weight of a reader: (inputs left,) int64}, the places of its inputs among those of the dense block's reader.

    plan: as in `solve_block_`. {} where the smaller block computes anything else: means of channels, scores of fewer
    channels, statistics of a norm, or what follows from another reader. One sample through both blocks shows it.
    Readers that see patches are solved with all of a kernel's taps, for which second moments of pixels do not do.
    """
    layers = readers(dense, plan.groups)
    merges = any(p.chosen is None and int(p.counts.max()) > 1 for p in plan.projections)
    writes = {axis.tensor for group in plan.groups for axis in group.writes}
    if len(plan.groups) != 1 or merges or writes & set(layers) or tracked_norms(dense):
        return {}
    if any(sees_patches(layer) for layer in layers.values()):
        return {}
    found, less = (arrivals(block, readers(block, plan.groups), example) for block in (dense, smaller))
    if found.keys() != less.keys():
        return {}
    kept: dict[str, Tensor] = {}
    for name, x in found.items():
        places = torch.arange(x.shape[1], dtype=torch.float64)[None]
        kept[name] = merged_inputs(places, name, plan.groups, plan.projections)[0].long()
        if not same_numbers(less[name], x[:, kept[name].to(x.device)]):
            return {}
    return kept


def arrivals(block: nn.Module, layers: Mapping[str, nn.Module], example: Example) -> dict[str, Tensor]:
    """{layer: (rows, inputs)}, copies of the inputs of the layers that the forward calls once."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def keep(stop: Stop) -> None:
        found[stop.name].append(stop.x.movedim(channel_dim(stop.layer), -1).flatten(0, -2).clone())

    with kept_modes(block), watched(layers, keep):
        forward(block.eval(), example)
    return {name: rows[0] for name, rows in found.items() if len(rows) == 1}


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Do these differ by rounding alone? Matrix products of other sizes add up in another order."""
    if a.shape != b.shape:
        return False
    allowed = ROUNDINGS * torch.finfo(a.dtype).eps
    return bool((a.double() - b.double()).norm() <= min(allowed, 1e-2) * b.double().norm())


def solve_kept_(
    smaller: nn.Module, dense: nn.Module, name: str, kept: Tensor, moments: Tensor, ridge: float | None
) -> None:
    """In place: solve the weight `name` of a smaller block from the second moments of the dense block's inputs to it.

    kept: (inputs left,) places of its inputs; moments: (inputs, inputs), Σ x xᵀ. With x' = x[kept], what the present
    weight S leaves of W x is D x, where D is W less S at the places that are kept: Σ x' (D x)ᵀ = (Σ x' xᵀ) Dᵀ.
    """
    layer: Any = smaller.get_submodule(name.rpartition(".")[0])
    dim = input_dim(layer)
    assert dim is not None
    kept = kept.to(moments.device)
    now, weight = (wide(matrix(block.get_parameter(name), dim, False)) for block in (smaller, dense))
    left = weight.index_add(0, kept, now, alpha=-1).to(moments)
    seen = moments[kept]
    change = least_squares(seen[:, kept], seen @ left, target_of("same", ridge))
    set_matrix_(layer.weight, dim, False, now + change)


def blocks_of(model: nn.Module, groups: Sequence[ChannelGroup], batches: Batches) -> dict[str, list[int]]:
    """{path of a block: places of its groups}, in the order of the forward pass; "" is the whole network.

    A module that the forward does not call, or not once (a ModuleList), is no block; the module around it is.
    """
    paths = [ancestor(tensors_of(group)) for group in groups]
    while True:
        found = {path for path in paths if not any(inside(path, other) for other in paths if other != path)}
        paths = [next(path for path in found if inside(own, path)) for own in paths]
        called = surveyed(model, {path: model.get_submodule(path) for path in found}, batches).order
        if found == set(called):
            return {path: [i for i, own in enumerate(paths) if own == path] for path in called}
        paths = [path if path in called or not path else path.rpartition(".")[0] for path in paths]


def ancestor(tensors: Iterable[str]) -> str:
    """The path of the smallest module that holds all these tensors."""
    paths = [name.split(".")[:-1] for name in tensors]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def tensors_of(group: ChannelGroup) -> list[str]:
    return [axis.tensor for axis in (*group.writes, *group.reads)]


def relative(group: ChannelGroup, path: str) -> ChannelGroup:
    """The group in the names of the module at this path."""
    if not path:
        return group

    def short(name: str | None) -> str | None:
        return None if name is None else name.removeprefix(f"{path}.")

    def axes(old: Sequence[Axis]) -> tuple[Axis, ...]:
        return tuple(replace(axis, tensor=axis.tensor.removeprefix(f"{path}.")) for axis in old)

    names: Any = ("weight", "bias", "mean", "var", "writer", "writer_bias")
    renamed: list[dict[str, Any]] = [{name: short(getattr(norm, name)) for name in names} for norm in group.norms]
    norms = tuple(replace(norm, **new) for norm, new in zip(group.norms, renamed, strict=True))
    return replace(group, writes=axes(group.writes), reads=axes(group.reads), norms=norms)


def example_of(stop: Stop) -> Example:
    """The arguments of a module's call as an Example; positional ones get their names where there are others."""
    if not stop.kwargs:
        return stop.args
    bound = inspect.signature(stop.layer.forward).bind(*stop.args, **stop.kwargs)
    kinds = {name: p.kind for name, p in bound.signature.parameters.items()}
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        named |= value if kinds[name] == inspect.Parameter.VAR_KEYWORD else {name: value}
    return named
