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
from pipeline.compression.calibrate.rows import Survey, gather_, input_dim, patches_of, rows_of, surveyed, wide
from pipeline.compression.group import ChannelGroup
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.merge.projection import Projection
from pipeline.compression.merge.tensors import compressed_tensors, merged_inputs
from pipeline.compression.trace.graph import Example
from pipeline.tables import pick

# λ by solve_on. smaller: accuracy is the same within a point from 1e-3 to 1e-1; dense: as in GRAIL's paper.
RIDGES = {"smaller": 1e-2, "dense": 1e-3}


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


@torch.no_grad()
def observe(model: nn.Module, groups: Iterable[ChannelGroup], pictures: Example | Iterable[Example]) -> Seen:
    """`Seen` of a model, from one pass over the pictures up to the last layer needed; pictures: see `batches_of`.

    Raises UserError for pictures that cannot be read twice, and for a forward that calls layers in varying order.
    """
    batches = batches_of(pictures)
    reads = {axis.tensor: axis.axis for group in groups for axis in group.reads if not axis.query}
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in reads}
    layers = {name: layer for name, layer in layers.items() if input_dim(layer) == reads[name]}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    moments: dict[str, list[Moments]] = defaultdict(list)

    def keep(i: int, stop: Stop) -> None:
        name, layer, x = stop
        if name not in layers:
            moments[name].append(moments_of(x))
            return
        gather_(inputs, name, rows_of(layer, x, survey.inputs[name], i), survey.inputs[name], i)
        if name in survey.patches:
            given = patches_of(layer, x, survey.patches[name], i) @ wide(matrix(layer.weight, 1, taps=True))
            gather_(outputs, name, given, survey.patches[name], i)

    with kept_modes(model):
        every = {**layers, **tracked_norms(model)}
        survey = surveyed(model.eval(), every, batches)
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
    groups: Iterable[ChannelGroup],
    projections: Iterable[Projection],
    seen: Seen,
    *,
    norm_scale: bool = True,
    ridge: float | None = None,
    solve_on: str = "smaller",
) -> list[str]:
    """In place: update the BatchNorm statistics of `smaller` and solve its readers, in the order of the forward pass.

    smaller: apply(model, groups, projections, norm_scale); seen: observe(model, groups, pictures).
    solve_on: "smaller", or "dense" for GRAIL: x' are the cluster means of x, and statistics stay as they are.
    ridge: λ of the module docstring; None: that of RIDGES.

    A statistic changes by as much as it does on the pictures, so pictures need not be quite the training ones.
    Returns the weights that were solved. Other readers (queries; weights that a forward uses without calling their
    layer, or more than once) keep their cluster sums. Raises UserError for an unknown solve_on, and for pictures that
    are not those of `seen`.
    """
    usual_ridge = pick("solve_on", RIDGES, solve_on)
    ridge = usual_ridge if ridge is None else ridge
    groups, projections = list(groups), list(projections)
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}
    work = [g for g, p in zip(groups, projections, strict=True) if not p.is_identity]
    if not work:  # no group has changed
        return []
    reads = [axis for group in work for axis in group.reads]
    queries = {axis.tensor for axis in reads if axis.query}
    changed = {axis.tensor: axis.axis for axis in reads if axis.tensor not in queries}  # and which of its axes

    def narrowed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All tensors, with the writers merged and the readers as before."""
        return {**tensors, **compressed_tensors(tensors, groups, projections, norm_scale, reads=False)}

    mends = solve_on == "smaller"
    # Outputs stand in the place of their layer's weight here, so that they merge as its rows do. Other tensors are not
    # kept: the copies are as large as the smaller network.
    edited = narrowed({**tensors, **seen.outputs} if mends else tensors)
    written = {name: edited[name] for name in changed if name in seen.inputs}
    del edited
    on_pictures = narrowed({**tensors, **seen.statistics}) if mends and seen.statistics else {}
    solved: list[str] = []
    norms = {name.rpartition(".")[0] for name in seen.statistics}
    gathered: dict[str, Tensor] = {}
    moments: dict[str, list[Moments]] = defaultdict(list)

    def arrive(i: int, stop: Stop) -> None:
        name, layer, x = stop
        if name in norms:
            moments[name].append(moments_of(x))
        elif mends:
            patches = name in seen.outputs
            counts = (seen.survey.patches if patches else seen.survey.inputs)[name]
            gather_(gathered, name, (patches_of if patches else rows_of)(layer, x, counts, i), counts, i)

    def solve(name: str, layer: Any) -> None:
        dim, taps = changed[name], mends and name in seen.outputs
        if taps:
            inputs, wanted = gathered.pop(name), written[name].T
        else:
            before = seen.inputs[name]
            inputs = gathered.pop(name) if mends else merged_inputs(before, name, groups, projections)
            wanted = before @ wide(matrix(written[name], dim, taps))
        now = wide(matrix(layer.weight, dim, taps))
        moments, missing = (inputs.T @ inputs).double(), (inputs.T @ (wanted - inputs @ now)).double()
        scale = moments.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        moments.diagonal().add_(ridge * scale)
        set_matrix_(layer.weight, dim, taps, now + torch.linalg.solve(moments, missing))
        solved.append(name)

    def estimate(name: str, norm: Any) -> None:
        follow_(norm, statistics_of(moments.pop(name)), [on_pictures[f"{name}.{kind}"] for kind in STATISTICS])

    order = [name for name in seen.survey.order if name in changed or (mends and name in norms)]
    layers = {name: smaller.get_submodule(name if name in norms else name.rpartition(".")[0]) for name in order}

    def leave(name: str) -> None:
        (estimate if name in norms else solve)(name, layers[name])

    if not mends:
        for name in order:
            leave(name)
        return solved
    with kept_modes(smaller):
        in_lockstep(smaller.eval(), layers, seen.pictures, arrive, leave)
    return solved


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
