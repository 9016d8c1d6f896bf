"""Compensation: every layer that reads compressed channels is solved anew, to restore its output before compression.

A layer that read x (I inputs) with the weight W now reads x' (I' inputs) from a network whose earlier layers are
compressed, and compensated already. Its new weight W' has the least E‖W x - W' x'‖² + λ m ‖W' - S‖²: ridge regression,
where S are the cluster sums, to which W' keeps where the pictures say nothing, and m is the mean of E[x'²]. For a
convolution x is the patch under its kernel, I = channels x taps (as OBC, arXiv:2208.11580, does for single weights):
neighbouring pixels tell about a dropped channel what the other channels at that pixel cannot. (Transposed convolutions
and those that pad inside their forward are solved for one factor a channel, as GRAIL does.)

GRAIL (arXiv:2602.23795) takes for x' the cluster means of the dense network's x, pixel by pixel, which is right for
kept channels of an exact x. Here x' is what the smaller network really computes: errors of earlier layers are corrected
as far as x' shows them, and nothing is assumed about merged channels. BatchNorm statistics are updated on the way (see
repair.py), each before the readers behind it are solved: updated later, it would undo the solution. Each network takes
one pass over the pictures; in the smaller one all batches go side by side (see lockstep.py).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.batches import Batches, batches_of
from pipeline.compression.calibrate.lockstep import Stop, in_lockstep, one_by_one
from pipeline.compression.calibrate.repair import STATISTICS, follow_, kept_modes, tracked_norms
from pipeline.compression.calibrate.rows import (
    ROWS,
    Rows,
    Survey,
    gather_,
    input_dim,
    patches_of,
    rows_of,
    surveyed,
    wide,
)
from pipeline.compression.group import ChannelGroup
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.merge.tensors import compressed_tensors, merged_inputs
from pipeline.compression.plan import Plan
from pipeline.compression.products import gram_matrix
from pipeline.example import Example
from pipeline.tables import pick


class Target(NamedTuple):
    """What a layer is solved for. ridge: the usual λ; own: m is each input's own E[x'²], not their mean."""

    ridge: float
    own: bool = False


# mend: the dense network's output, from what the smaller one computes; accuracy is the same within a point from 1e-3 to
# 1e-1. dense: the same from the dense network's own inputs, as in GRAIL's paper. same: the layer's own output on the
# inputs that reach it now (see blocks.py); where few channels carry most of the activations, as in language models, a
# ridge by their mean would leave nothing of the others.
TARGETS = {"mend": Target(1e-2), "dense": Target(1e-3), "same": Target(3e-2, own=True)}
TOKENS = 2**17  # rows that second moments go by, at most; no row is kept


class Moments(NamedTuple):
    """Moments of the channels on one batch. mean, rest: (C,), rest = Σ (x - mean)² over `size` values."""

    size: int
    mean: Tensor
    rest: Tensor


class Seen(NamedTuple):
    """Inputs and outputs of a network's readers, and its BatchNorm statistics, on some pictures.

    inputs: {weight: (rows, inputs)}, the inputs of the readers, rows = pixels or tokens: at most ROWS, drawn alike for
        every network. Only linear layers and convolutions that the forward calls, and calls once.
    outputs: {weight: (outputs, rows)} of the readers that see patches (`sees_patches`), less their biases; here rows
        are pixels of the output
    statistics: {buffer: (C,)}, means and variances of the BatchNorms on these pictures
    """

    pictures: Batches
    survey: Survey
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    statistics: dict[str, Tensor]


def readers(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, nn.Module]:
    """{weight: its layer}, of the readers of these groups that can be solved."""
    reads = {axis.tensor: axis.axis for group in groups for axis in group.reads if not axis.query}
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in reads}
    return {name: layer for name, layer in layers.items() if input_dim(layer) == reads[name]}


def second_moments(model: nn.Module, groups: Iterable[ChannelGroup], batches: Batches) -> dict[str, Tensor]:
    """{weight: (inputs, inputs)}: Σ x xᵀ over the rows of a sample, the mean over samples, of the readers' inputs x."""
    return input_moments(model, readers(model, groups), batches, patches=False)


@torch.no_grad()
def input_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, limit: int = TOKENS, patches: bool = True
) -> dict[str, Tensor]:
    """{layer: (inputs, inputs)}: Σ x xᵀ over the rows of a sample, the mean over samples, of the layers' inputs x.

    limit: rows that are looked at, at most. patches: x is the patch under the kernel, channels x taps, of convolutions
    that see patches. Layers that the forward does not call, or calls more than once, are left out.
    """
    found: dict[str, Tensor] = {}

    def rows(survey: Survey, name: str) -> Rows:
        return survey.patches[name] if patches and name in survey.patches else survey.inputs[name]

    def keep(i: int, stop: Stop) -> None:
        name, layer = stop.name, stop.layer
        seen = (patches_of if patches and name in survey.patches else rows_of)(layer, stop.x, rows(survey, name), i)
        moments = gram_matrix(seen.T)
        found[name] = moments if name not in found else found[name].add_(moments)

    with kept_modes(model):
        survey = surveyed(model.eval(), layers, batches, limit=limit)
        one_by_one(model, {name: layers[name] for name in survey.order}, batches, keep)
    for name, moments in found.items():
        count = sum(rows(survey, name).counts)
        moments.mul_(count / min(count, limit) / batches.count)
    return found


@torch.no_grad()
def observe(
    model: nn.Module, groups: Iterable[ChannelGroup], pictures: Example | Iterable[Example], rows: int = ROWS
) -> Seen:
    """`Seen` of a model, from one pass over the pictures up to the last layer needed; pictures: see `batches_of`.

    rows: that are kept of each layer, at most.
    Raises UserError for pictures that cannot be read twice, and for a forward that calls layers in varying order.
    """
    batches, layers = batches_of(pictures), readers(model, groups)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    moments: dict[str, list[Moments]] = defaultdict(list)

    def keep(i: int, stop: Stop) -> None:
        name, layer, x = stop.name, stop.layer, stop.x
        if name not in layers:
            moments[name].append(moments_of(x))
            return
        gather_(inputs, name, rows_of(layer, x, survey.inputs[name], i), survey.inputs[name], i)
        if name in survey.patches:
            given = patches_of(layer, x, survey.patches[name], i) @ wide(matrix(layer.weight, 1, taps=True))
            gather_(outputs, name, given, survey.patches[name], i)

    with kept_modes(model):
        every = {**layers, **tracked_norms(model)}
        survey = surveyed(model.eval(), every, batches, rows)
        one_by_one(model, {name: every[name] for name in survey.order}, batches, keep)
    pooled = {name: statistics_of(of_norm) for name, of_norm in moments.items()}
    statistics = {
        f"{name}.{kind}": t for name, pair in pooled.items() for kind, t in zip(STATISTICS, pair, strict=True)
    }
    return Seen(batches, survey, inputs, {name: given.T for name, given in outputs.items()}, statistics)


@torch.no_grad()
def compensate_(
    smaller: nn.Module,
    model: nn.Module,
    plan: Plan,
    seen: Seen,
    *,
    ridge: float | None = None,
    target: str = "mend",
) -> list[str]:
    """In place: update the BatchNorm statistics of `smaller` and solve its readers, in the order of the forward pass.

    smaller: the model after the plan; seen: observe(model, plan.groups, pictures).
    target: a row of TARGETS. "dense", for GRAIL: x' are the cluster means of x, and statistics stay as they are. "same"
        is right for a block and what reaches it now: see `compensate_blocks_`.
    ridge: λ of the module docstring; None: that of TARGETS.

    A statistic changes by as much as it does on the pictures, so pictures need not be quite the training ones.
    Returns the weights that were solved. Other readers (queries; weights that a forward uses without calling their
    layer, or more than once) keep their cluster sums. Raises UserError for an unknown target, and for pictures that
    are not those of `seen`.
    """
    how = target_of(target, ridge)
    if all(projection.is_identity for projection in plan.projections):
        return []
    work = Compensation(smaller, model, plan, seen, how, target != "dense")
    if work.mends:
        with kept_modes(smaller):
            in_lockstep(smaller.eval(), work.layers, seen.pictures, work.arrive, work.leave)
    else:
        for name in work.layers:
            work.leave(name)
    return work.solved


def target_of(name: str, ridge: float | None = None) -> Target:
    """The row of TARGETS, with this ridge if one is given. UserError for an unknown name."""
    usual = pick("target", TARGETS, name)
    return usual if ridge is None else usual._replace(ridge=ridge)


class Compensation:
    """The layers of one smaller network that change on pictures, each when the inputs of all batches have arrived.

    mends: readers are solved on what the smaller network computes, else on what the dense one does (GRAIL).
    layers: {weight or norm: its layer}, in the order of the forward pass; solved: the weights that are done.
    """

    def __init__(self, smaller: nn.Module, model: nn.Module, plan: Plan, seen: Seen, how: Target, mends: bool) -> None:
        self.plan, self.seen, self.how, self.mends = plan, seen, how, mends
        self.solved: list[str] = []
        self.gathered: dict[str, Tensor] = {}
        self.moments: dict[str, list[Moments]] = defaultdict(list)
        changed = [g for g, p in zip(plan.groups, plan.projections, strict=True) if not p.is_identity]
        reads = [axis for group in changed for axis in group.reads]
        queries = {axis.tensor for axis in reads if axis.query}
        self.axes = {axis.tensor: axis.axis for axis in reads if axis.tensor not in queries}  # of the weights to solve
        tensors = {name: t.detach() for name, t in named_tensors(model).items()}

        def narrowed(found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            """All tensors and those that were found, with the writers merged and the readers as before."""
            every = {**tensors, **found}
            edited = compressed_tensors(every, plan.groups, plan.projections, plan.joint_norms, reads=False)
            return {**every, **edited}

        # Outputs stand in the place of their layer's weight here, so that they merge as its rows do. Other tensors are
        # not kept: the copies are as large as the smaller network.
        edited = narrowed(seen.outputs if mends else {})
        self.written = {name: edited[name] for name in self.axes if name in seen.inputs}
        self.on_pictures = narrowed(seen.statistics) if mends and seen.statistics else {}
        self.norms = {name.rpartition(".")[0] for name in seen.statistics} if mends else set()
        order = [name for name in seen.survey.order if name in self.axes or name in self.norms]
        owner = {name: name if name in self.norms else name.rpartition(".")[0] for name in order}
        self.layers = {name: smaller.get_submodule(path) for name, path in owner.items()}

    def arrive(self, i: int, stop: Stop) -> None:
        """Keep what a layer is given of batch i: moments of a norm's input, rows of a reader's."""
        name, layer, x = stop.name, stop.layer, stop.x
        if name in self.norms:
            self.moments[name].append(moments_of(x))
            return
        patches = name in self.seen.outputs
        there = (self.seen.survey.patches if patches else self.seen.survey.inputs)[name]
        gather_(self.gathered, name, (patches_of if patches else rows_of)(layer, x, there, i), there, i)

    def leave(self, name: str) -> None:
        """All batches have arrived at this layer: set its statistics, or solve its weight."""
        if name in self.norms:
            before = [self.on_pictures[f"{name}.{kind}"] for kind in STATISTICS]
            follow_(self.layers[name], statistics_of(self.moments.pop(name)), before)
        else:
            self.solve(name)

    def solve(self, name: str) -> None:
        """The least squares of the module docstring, from the present weight, by the normal equations."""
        layer: Any = self.layers[name]
        dim, taps = self.axes[name], self.mends and name in self.seen.outputs
        if taps:
            inputs, wanted = self.gathered.pop(name), self.written[name].T
        else:
            before, plan = self.seen.inputs[name], self.plan
            merged = None if self.mends else merged_inputs(before, name, plan.groups, plan.projections)
            inputs = self.gathered.pop(name) if merged is None else merged
            wanted = before @ wide(matrix(self.written[name], dim, taps))
        now = wide(matrix(layer.weight, dim, taps))
        change = least_squares(gram_matrix(inputs.T), inputs.T @ (wanted - inputs @ now), self.how)
        set_matrix_(layer.weight, dim, taps, now + change)
        self.solved.append(name)


def least_squares(moments: Tensor, missing: Tensor, how: Target) -> Tensor:
    """(inputs, outputs) float64: what to add to a weight, with the ridge of the module docstring.

    moments: (inputs, inputs), Σ x' x'ᵀ; missing: (inputs, outputs), Σ x' rᵀ with what the present weight leaves, r.
    """
    moments = moments.to(torch.float64, copy=True)  # the ridge is added in place
    scale = moments.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    if how.own:
        scale = moments.diagonal().clamp(min=1e-6 * scale)  # an input that is never seen is solved for, too
    moments.diagonal().add_(how.ridge * scale)
    return torch.linalg.solve(moments, missing.double())


def channel_moments(x: Tensor, correction: int = 0) -> tuple[Tensor, Tensor]:
    """(variance, mean) as STATISTICS, each (C,), of (N, C, ...); correction: as in torch.var."""
    return statistics_of([moments_of(x)], correction)


def moments_of(x: Tensor) -> Moments:
    """Moments of (N, C, ...), over all dimensions but the channels."""
    x = wide(x).reshape(*x.shape[:2], -1)  # (N, C, pixels)
    count = x.shape[0] * x.shape[2]
    mean = x.sum(2).sum(0) / count
    centred = x - mean[:, None]
    # On the CPU torch.var_mean and its gradient take twice as long, and were half the time of a compensation.
    return Moments(count, mean, torch.linalg.vecdot(centred, centred).sum(0))


def statistics_of(batches: Sequence[Moments], correction: int = 0) -> tuple[Tensor, Tensor]:
    """STATISTICS of all batches together, each (C,) (Chan et al. 1979); correction: as in torch.var."""
    size, first = sum(one.size for one in batches), batches[0].mean
    mean = first + sum((one.size / size * (one.mean - first) for one in batches[1:]), torch.zeros_like(first))
    rest = sum((one.rest + one.size * (one.mean - mean).square() for one in batches), torch.zeros_like(first))
    return rest / (size - correction), mean


def matrix(weight: Tensor, dim: int, taps: bool) -> Tensor:
    """A weight as (inputs, outputs), its inputs along `dim`; taps: every tap of a channel is an input of its own."""
    return weight.flatten(1).T if taps else weight.movedim(dim, 0).flatten(1)


def set_matrix_(weight: Tensor, dim: int, taps: bool, new: Tensor) -> None:
    """In place: set the weight from its `matrix`, new: (inputs, outputs)."""
    weight.copy_(new.T.reshape(weight.shape) if taps else new.view_as(weight.movedim(dim, 0)).movedim(0, dim))
