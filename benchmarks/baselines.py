"""Methods of others that are no recipes here, and our solver with parts taken away: what benchmarks.trained compares.

Every function takes the dense network and gives a smaller copy of it. All are made of the engine's own pieces, so they
differ in nothing but what their docstrings say.
"""

from collections.abc import Mapping
from functools import partial

import torch
from sklearn.linear_model import lars_path_gram
from torch import Tensor, nn

from pipeline.compression.calibrate.batches import Batches
from pipeline.compression.calibrate.compensate import Seen, compensate_, matrix, observe, readers
from pipeline.compression.calibrate.lockstep import Stop, one_by_one
from pipeline.compression.calibrate.repair import kept_modes
from pipeline.compression.calibrate.rows import patches_of, rows_of, surveyed, wide
from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.compression.merge.modules import apply
from pipeline.compression.merge.projection import Projection
from pipeline.compression.plan import Plan


def solved(model: nn.Module, plan: Plan, seen: Seen, taps: bool = True, statistics: bool = True) -> nn.Module:
    """Readers solved for the dense network's output, from what the smaller one computes: "+data", or less than it.

    seen: observe(model, plan.groups, pictures). taps: every tap of a kernel is solved by itself, else all taps of a
    channel share one factor, as in GRAIL. statistics: BatchNorm statistics are updated on the way.
    """
    smaller = apply(model, plan.groups, plan.projections, plan.joint_norms)
    less = seen._replace(outputs=seen.outputs if taps else {}, statistics=seen.statistics if statistics else {})
    compensate_(smaller, model, plan, less)
    return smaller


def sequential_grail(model: nn.Module, plan: Plan, pictures: Batches) -> nn.Module:
    """GRAIL (arXiv:2602.23795) as its code for language models does it: groups in turn, each on what reaches it now.

    The readers of a group are solved for their own output before this group was compressed, in the network whose
    earlier groups are compressed already. "+grail" is its code for pictures: all groups on the dense network's inputs.
    """
    for group, projection in zip(plan.groups, plan.projections, strict=True):
        if not projection.is_identity:
            one = Plan(ChannelGroups((group,)), [projection], plan.joint_norms)
            seen = observe(model, one.groups, pictures)
            smaller = apply(model, one.groups, one.projections, one.joint_norms)
            compensate_(smaller, model, one, seen, target="dense")
            model = smaller
    return model


def channel_pruning(model: nn.Module, plan: Plan, seen: Seen) -> nn.Module:
    """Channel pruning of He et al. 2017 (arXiv:1707.06168): LASSO chooses channels, least squares rebuild the output.

    plan: says the groups and, by its projections, how many channels each keeps. Equation 1: channels are chosen by
    argmin ½‖Y - Σ β_i X_i W_i‖² + λ‖β‖₁ with λ raised until few enough are left, then W = argmin ‖Y - X' W‖² with X' of
    the network that is pruned already and Y of the dense one. Here X_i of the choice are the dense network's, so that
    all channels are chosen at once, and channels with several readers are chosen by the sum of their equations, each
    divided by ‖Y‖².
    """
    grams = output_grams(model, plan.groups, seen.pictures)
    chosen = [
        p if p.is_identity else lasso_choice(sum_of_readers(group, grams), len(p.counts))
        for group, p in zip(plan.groups, plan.projections, strict=True)
    ]
    return solved(model, Plan(plan.groups, chosen, plan.joint_norms), seen, statistics=False)


@torch.no_grad()
def output_grams(model: nn.Module, groups: ChannelGroups, pictures: Batches) -> dict[str, Tensor]:
    """{reader: (C, C) float64}: <X_i W_i, X_j W_j> over rows and outputs, of every two channels that it reads."""
    layers = readers(model, groups)
    found: dict[str, Tensor] = {}
    with kept_modes(model):
        survey = surveyed(model.eval(), layers, pictures)

        def keep(i: int, stop: Stop) -> None:
            patches = stop.name in survey.patches
            there = (survey.patches if patches else survey.inputs)[stop.name]
            rows = (patches_of if patches else rows_of)(stop.layer, stop.x, there, i).double()
            found[stop.name] = found.get(stop.name, 0) + rows.T @ rows

        one_by_one(model, {name: layers[name] for name in survey.order}, pictures, keep)
    return {name: of_channels(moments, layers[name]) for name, moments in found.items()}


def of_channels(moments: Tensor, layer: nn.Module) -> Tensor:
    """(C, C) inner products of the channels' contributions. moments: (C x taps, C x taps) of the layer's inputs."""
    weight = wide(matrix(layer.weight, 1, taps=True)).double()
    every, channels = moments * (weight @ weight.T), layer.weight.shape[1]
    return every.reshape(channels, len(every) // channels, channels, -1).sum((1, 3))


def sum_of_readers(group: ChannelGroup, grams: Mapping[str, Tensor]) -> Tensor:
    """(C, C): the inner products over all readers of a group, each divided by the energy of its output."""
    found = [grams[axis.tensor] for axis in group.reads if axis.tensor in grams]
    return torch.stack([gram / gram.sum() for gram in found]).sum(0)


def lasso_choice(gram: Tensor, left: int) -> Projection:
    """The `left` channels that the LASSO drops last. gram: (C, C) inner products <Z_i, Z_j>, and Y = Σ Z_i."""
    _, _, path = lars_path_gram(gram.sum(1).numpy(), gram.numpy(), n_samples=1, method="lasso")
    path = torch.from_numpy(path).abs()  # (C, steps), from λ where all are zero to λ = 0
    many = ((path > 0).sum(0) >= left).nonzero()
    at = path[:, int(many[0])] if len(many) else path[:, -1]
    kept = at.argsort(descending=True, stable=True)[:left].sort().values
    labels = torch.full((len(gram),), -1)
    labels[kept] = torch.arange(left)
    return Projection(labels)


# Between GRAIL and "+data", one part more in each: the order, what is solved for, taps, statistics.
LADDER = {
    "grail, in sequence": lambda model, plan, seen: sequential_grail(model, plan, seen.pictures),
    "+ errors mended": partial(solved, taps=False, statistics=False),
    "+ taps": partial(solved, statistics=False),
    "+ statistics": solved,
}
