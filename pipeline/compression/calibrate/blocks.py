"""Block by block: the readers of a block are solved for the block's own answer to the inputs that reach it now.

A block is the smallest module that holds all layers of a channel group: the feed-forward part of a transformer's layer,
its attention, a residual block of a ResNet. Compensation then treats each block as a network of its own (see
compensate.py): the dense block and the smaller one are called with the same inputs, which are those that the blocks
before, already compressed and solved, give. SparseGPT (arXiv:2301.00774), ZipLM (arXiv:2302.04089) and FLAP
(arXiv:2312.11983) solve for the same. Errors of earlier blocks are not mended, and so nothing is fitted to chance
correlations with them; one block at a time is in memory, with the inputs of all batches.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from pipeline.compression.calibrate.batches import Batches
from pipeline.compression.calibrate.compensate import compensate_, observe
from pipeline.compression.calibrate.lockstep import Stop, in_lockstep
from pipeline.compression.calibrate.repair import kept_modes
from pipeline.compression.calibrate.rows import ROWS, surveyed
from pipeline.compression.group import Axis, ChannelGroup, ChannelGroups
from pipeline.compression.plan import Plan
from pipeline.compression.trace.graph import Example

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
        dense = model.get_submodule(path)
        seen = observe(dense, groups, inputs, rows=max(ROWS, VALUES // max(group.size for group in groups)))
        names = compensate_(smaller.get_submodule(path), dense, of_block, seen, ridge=ridge, target="same")
        solved.extend(f"{path}.{name}" if path else name for name in names)

    with kept_modes(smaller):
        blocks = blocks_of(smaller.eval(), [plan.groups[i] for i in changed], batches)
        in_lockstep(smaller, {path: smaller.get_submodule(path) for path in blocks}, batches, arrive, leave)
    return solved


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
