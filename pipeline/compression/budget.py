"""How many channels stay of every group: a ratio of each, or a share of a budget by what each can spare."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from pipeline.compression.calibrate.outputs import Outputs
from pipeline.compression.checks import protected
from pipeline.compression.choose.layers import other_units, own_ratios
from pipeline.compression.group import ChannelGroup
from pipeline.compression.merge.modules import apply
from pipeline.compression.merge.projection import Projection
from pipeline.compression.network import Network, choices, compensated_
from pipeline.compression.recipe import Recipe
from pipeline.compression.sizes.allocate import Errors, allocated, monotone, output_errors, parameter_errors
from pipeline.compression.sizes.count import macs, parameters
from pipeline.compression.sizes.sensitivity import loss_errors, output_slopes
from pipeline.tables import UserError


def sizes_left(net: Network, recipe: Recipe, ratios: Sequence[float]) -> dict[float, list[int]]:
    """{ratio: channels that stay of every group}"""
    groups, full, round_to = net.groups, net.full or {}, recipe.sizes.round_to
    whole = [*protected(groups, recipe.sizes.protect), *other_units(net.model, groups, recipe.scope.units)]

    def left(group: ChannelGroup, ratio: float) -> int:
        return min(group.size, channels_left(full.get(group.name, group.size), ratio, round_to))

    sizes = {}
    for ratio in ratios:
        own = own_ratios([g.name for g in groups], ratio, net.own)
        sizes[ratio] = [g.size if g in whole else left(g, own[g.name]) for g in groups]
        for tie in groups.ties if net.own else ():
            if len({sizes[ratio][i] for i in tie}) > 1:
                raise UserError(f"{groups[tie[0]].tie} has groups that keep equal sizes; give all of them one ratio")
    return sizes if recipe.sizes.allocate == "uniform" else sizes_under_budget(net, recipe, sizes)


def sizes_under_budget(net: Network, recipe: Recipe, uniform: Mapping[float, Sequence[int]]) -> dict[float, list[int]]:
    budget = recipe.sizes.allocate

    def rounded(size: int, left: float) -> int:
        return channels_left(size, 1 - left, recipe.sizes.round_to)

    def left_at(sizes: Sequence[int]) -> int:
        """Parameters or MACs, of the whole example, at these sizes; channels that stay do not matter."""
        kept = [first_channels(g.size, k) for g, k in zip(net.groups, sizes, strict=True)]
        smaller = apply(net.model, net.groups, kept)
        return parameters(smaller) if budget == "params" else macs(smaller, net.example, net.counted)

    errors = errors_of(net, recipe, rounded)
    return allocated(net.model, net.example, net.groups, errors, uniform, budget, rounded, left_at)


def errors_of(
    net: Network, recipe: Recipe, rounded: Callable[[int, float], int]
) -> Callable[[Sequence[int], Sequence[int]], Errors]:
    """(places of the groups of one tie, sizes) -> the error that the recipe's budget goes by, as a function of size."""
    model, groups, spare = net.model, net.groups, recipe.sizes.spare or ("loss" if net.blockwise else "output")

    def choose(group: ChannelGroup, sizes: Sequence[int]) -> dict[int, tuple[Projection, float]]:
        return {k: (p, row.error) for k, (p, row) in choices(net, recipe, group, sizes).items()}

    if net.pictures is None or spare == "parameters":
        return lambda tie, sizes: parameter_errors(model, groups, tie, sizes, choose)
    if spare == "output":
        dense, solve = Outputs(model, net.pictures, net.answers), partial(compensated_, net)
        return lambda tie, _: output_errors(model, groups, tie, dense, solve, choose, rounded)
    slopes = output_slopes(model, groups, net.pictures, net.seed, net.answers)

    def of_loss(tie: Sequence[int], sizes: Sequence[int]) -> Errors:
        chosen = [choose(groups[i], sizes) for i in tie]
        projections = {k: [of_group[k][0] for of_group in chosen] for k in sizes}
        found = loss_errors([groups[i] for i in tie], net.tensors, net.moments, slopes, projections)
        return monotone(sorted(sizes), [found[k] for k in sorted(sizes)])

    return of_loss


def channels_left(size: int, ratio: float, round_to: int = 1) -> int:
    """Channels that remain of `size`: rounded down, as the study does, but at least one.

    round_to: then to the nearest multiple of it, but at least one multiple and at most `size`.
    """
    left = max(1, int(size * (1 - ratio) + 1e-9))
    if left == size or round_to == 1:
        return left
    return min(size, max(1, (left + round_to // 2) // round_to) * round_to)


def first_channels(size: int, left: int) -> Projection:
    return Projection(torch.where(torch.arange(size) < left, torch.arange(size), -1))
