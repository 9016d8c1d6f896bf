"""compress(model, example, method, ratio) -> a smaller model and a report of what was done to it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from numbers import Real
from typing import Any, NamedTuple, overload

import torch
from torch import nn

from pipeline.compression.calibrate.batches import Batches, batches_of, samples
from pipeline.compression.calibrate.blocks import compensate_blocks_
from pipeline.compression.calibrate.compensate import Seen, compensate_, observe, second_moments
from pipeline.compression.calibrate.outputs import Answers, Outputs
from pipeline.compression.calibrate.predict import judge
from pipeline.compression.calibrate.synthetic import synthesize
from pipeline.compression.calibrate.texts import unigram_texts, written_texts
from pipeline.compression.certify import certificates
from pipeline.compression.choose.gradients import Gradients
from pipeline.compression.choose.layers import check_beginning, check_own, other_units, own_ratios
from pipeline.compression.choose.masks import masks_of
from pipeline.compression.choose.methods import METHODS
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.compression.merge.modules import apply, named_tensors, new_numbers, resized
from pipeline.compression.merge.projection import Projection
from pipeline.compression.plan import Plan, history, went_through_
from pipeline.compression.recipe import AUTO, Calibration, Recipe, parse, recipe, spell
from pipeline.compression.report import GroupReport, Report, group_report, layer_report, step_of
from pipeline.compression.sizes.allocate import Errors, allocated, monotone, output_errors, parameter_errors
from pipeline.compression.sizes.count import Counted, macs, parameters
from pipeline.compression.sizes.sensitivity import loss_errors, output_slopes
from pipeline.compression.trace.graph import Example, channel_groups
from pipeline.tables import UserError, call

# Candidates of the method "auto" without pictures, and with them.
CANDIDATES = ("fold+ar", "mix+ar", "mix", "l2")
COMPENSATED = ("mix", "fold", "l2", "obs")

# One group at one size: its projection, and the line of the report on it.
Choice = tuple[Projection, GroupReport]


class Compressed(NamedTuple):
    """A smaller model and the report of how it came about."""

    model: nn.Module
    report: Report


def remembered(smaller: nn.Module, model: nn.Module, report: Report) -> Compressed:
    """The smaller network and its report. Its history becomes the model's, followed by this compression."""
    went_through_(smaller, (*history(model), step_of(report)))
    return Compressed(smaller, report)


@dataclass
class Network:
    """A network to compress, with the values that all its compressions share.

    model: without hooks and masks. example: what it is called with; a batch of one is enough.
    groups: its channel groups. pictures: unlabelled inputs that methods look at. seed: for all that is drawn at random.
    answers: output -> (rows, classes), by which two networks are compared; None: all outputs side by side.
    full: {group name: channels before any compression}, which ratios count from; None: the present sizes.
    counted: a cache of MACs for this architecture.
    target: what readers are solved for on the pictures, a row of TARGETS.
    certify: whether reports hold certificates (see certify.py).
    own: ratios that some groups, or masked weights, have in place of the given one (see layers.own_ratios).
    """

    model: nn.Module
    example: Example
    groups: ChannelGroups
    pictures: Batches | None = None
    answers: Answers | None = None
    seed: int = 0
    full: Mapping[str, int] | None = None
    counted: Counted = field(default_factory=Counted)
    target: str = "mend"
    certify: bool = True
    own: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: t.detach() for name, t in named_tensors(self.model).items()}

    @cached_property
    def seen(self) -> Seen | None:
        """Rows of activations on the pictures; None without pictures, and where blocks are solved one by one."""
        return None if self.pictures is None or self.blockwise else observe(self.model, self.groups, self.pictures)

    @cached_property
    def moments(self) -> Mapping[str, torch.Tensor]:
        """Second moments of the readers' inputs; {} without pictures."""
        return {} if self.pictures is None else second_moments(self.model, self.groups, self.pictures)

    @property
    def blockwise(self) -> bool:
        return self.target == "same"

    @cached_property
    def gradients(self) -> Gradients | None:
        """Gradients on the pictures, computed when a method first asks for them; None without pictures."""
        if self.pictures is None:
            return None
        return Gradients(self.model, self.groups, self.pictures, self.seed, self.answers)

    @cached_property
    def cost(self) -> tuple[int, int]:
        """Its parameters and MACs."""
        return self.cost_of(self.model)

    def cost_of(self, model: nn.Module) -> tuple[int, int]:
        """Parameters of a network of this architecture, and its MACs for one sample."""
        return parameters(model), macs(model, self.example, self.counted) // samples(self.example)


@overload
def compress(model: nn.Module, example: Example, method: str = ..., ratio: float = ..., **options) -> Compressed: ...
@overload
def compress(
    model: nn.Module, example: Example, method: str, ratio: Sequence[float], **options
) -> list[Compressed]: ...
def compress(model, example, method="fold", ratio=0.5, **options):
    """A smaller copy of `model`: an ordinary nn.Module in which every channel group has lost `ratio` of its channels.

    example: what the model is called with (a tensor, a tuple of arguments or a dict of keyword arguments).
    method: a name in METHODS: fold, l1, l2, ...; or in MASKS: magnitude, lamp, n_m, ..., which set single weights to
        zero and leave all shapes as they are; or "auto": the method of the highest predicted accuracy; or the spelling
        of a compression recipe, "mix+data", or a Recipe.
    ratio: fraction of each group's channels to remove (for MASKS: of the weights), 0 <= ratio < 1; or a sequence of
        ratios, which returns a list and computes once what the ratios share.
    options: those of `compressions`, and those of the method (fold: refine; l1, l2: score; n_m: m).

    The input model is untouched. Raises UserError for an unknown method, a ratio out of range, weights that are not
    finite, a model that torch.export cannot trace (masks need no trace) and one that has nothing to compress.
    """
    if isinstance(ratio, (int, float)):
        return next(compressions(model, example, method, [ratio], **options))
    return list(compressions(model, example, method, ratio, **options))


def compressions(
    model: nn.Module,
    example: Example,
    method: str | Recipe,
    ratios: Sequence[float],
    *,
    pictures: Example | Iterable[Example] | None = None,
    judge_on: Example | Iterable[Example] | None = None,
    answers: Answers | None = None,
    groups: ChannelGroups | None = None,
    counted: Counted | None = None,
    full: Mapping[str, int] | None = None,
    seed: int = 0,
    certify: bool = True,
    own: Mapping[str, float] | None = None,
    **options: Any,
) -> Iterator[Compressed]:
    """`compress` for several ratios, one at a time: an iterator, so that only one smaller model need be in memory.

    pictures: unlabelled network inputs, or synthetic ones (`synthesize`), some hundred: one batch (what the model is
        called with), or a collection of batches that can be read again, such as a list. Methods then see activations
        (taylor, fisher: gradients), and readers are solved on the pictures (ridge, target: see compensate_).
        A recipe that says "synthetic", "self" or "unigram" makes its own where none are given.
    answers: output of the network -> (rows, classes), by which two networks are compared and labels drawn, so that a
        token of a text counts as a picture does; None: all outputs of a sample side by side.
    judge_on: network inputs on which "auto" compares the candidates; None: the pictures, else synthetic ones.
    groups: what `channel_groups(model, example, parts)` gave for this architecture; traced anew when None.
    counted: a cache of MACs for this architecture, shared by methods whose networks have the same sizes.
    full: {group name: channels before any compression}, which ratios count from; None: the present sizes.
    seed: for methods that draw at random.
    certify: state the least errors of any pruning and any projection beside the method's (see certify.py); False saves
        the eigenvalues of every group's Gram matrix, 2 s for 3,072 channels.
    own: {beginning of the name of a group, or of a masked weight: its own ratio, in place of the given one; 0 leaves it
        whole}; not with a budget, which decides the sizes itself.
    options: those of a compression recipe (see `pipeline.compression.recipe`): parts, units; features, scale, norm;
        norm_scale, approximate_repair; round_to, allocate, spare, protect; ridge, target; and those of the method.

    Raises UserError as `compress` does.
    """
    done = wanted(method, pictures is not None, options)
    check_ratios(ratios, done.sizes.round_to)
    own = own or {}
    check_own(own, done.sizes.allocate)
    # Hooks and masks of the live model stay out of the smaller ones.
    bare = bare_copy(model, share=True)
    check_finite({name: t.detach() for name, t in named_tensors(bare).items()})
    counted = Counted() if counted is None else counted
    if done.kind == "mask":
        whole = Network(bare, example, ChannelGroups(()), seed=seed, counted=counted, own=own)
        return masked_copies(whole, done, ratios)
    if done.kind == AUTO:
        bare.eval()
    groups = channel_groups(bare, example, done.scope.parts) if groups is None else groups
    check_groups(bare, groups)
    if pictures is None and done.calibration.pictures != "none":
        pictures = made_pictures(bare, example, done.calibration, seed, answers)
    batches = None if pictures is None else batches_of(pictures)
    target = done.calibration.target or ("mend" if batches is None else usual_target(batches))
    net = Network(bare, example, groups, batches, answers, seed, full, counted, target, certify, own)
    if done.kind == AUTO:
        return judged_copies(net, done, ratios, judge_on)
    return smaller_copies(net, done, ratios)


def wanted(method: str | Recipe, pictures: bool, options: Mapping[str, Any]) -> Recipe:
    """The compression recipe of a method with options, of a spelling, or of a Recipe; pictures: whether any are given.

    Raises UserError for options beside a spelling or a Recipe.
    """
    if isinstance(method, str) and "+" not in method:
        return recipe(method, pictures="data" if pictures else None, **options)
    if options:
        raise UserError(f"{method} is a whole recipe; give {', '.join(options)} as a part of it")
    return parse(method) if isinstance(method, str) else method


def made_pictures(
    model: nn.Module, example: Example, calibration: Calibration, seed: int = 0, answers: Answers | None = None
) -> torch.Tensor:
    """Network inputs for this calibration that the network itself gives. UserError where it needs data."""
    count: dict[str, Any] = {} if calibration.size is None else {"count": calibration.size}
    if calibration.pictures == "synthetic":
        return synthesize(model, example, seed=seed, **count)
    if calibration.pictures == "unigram":
        return unigram_texts(model, example, seed=seed, answers=answers, **count)
    if calibration.pictures == "self":
        drawn: dict[str, Any] = {"temperature": calibration.temperature, "answers": answers}
        return written_texts(model, example, seed=seed, **drawn, **count)
    raise UserError("this method looks at data; give unlabelled network inputs as pictures=")


def judged_copies(
    net: Network, recipe: Recipe, ratios: Sequence[float], judge_on: Example | Iterable[Example] | None = None
) -> Iterator[Compressed]:
    """For every ratio the candidates' copy with the highest predicted accuracy (see predict.py).

    The recipe's option `candidates` lists names in METHODS, also with "+ar" behind; the first of them wins a tie.
    """
    usual = CANDIDATES if net.pictures is None else COMPENSATED
    makers = {}
    for name in recipe.option.get("candidates") or usual:
        alone = name.removesuffix("+ar")
        merging = replace(recipe.merging, approximate_repair=alone != name)
        makers[name] = partial(smaller_copies, net, replace(recipe, method=alone, options=(), merging=merging))
    if judge_on is None:
        judge_on = synthesize(net.model, net.example, seed=net.seed) if net.pictures is None else net.pictures
    judged = judge(net.model, judge_on, net.answers)
    found = {
        (name, report.ratio): judged(smaller) for name, maker in makers.items() for smaller, report in maker(ratios)
    }
    for ratio in ratios:
        worth = {name: found[name, float(ratio)] for name in makers}
        best = max(worth, key=worth.__getitem__)
        smaller, report = next(makers[best]([ratio]))
        told = replace(report, method=f"{recipe.method} ({best})", recipe=spell(recipe))
        yield remembered(smaller, net.model, told)


def masked_copies(net: Network, recipe: Recipe, ratios: Sequence[float]) -> Iterator[Compressed]:
    """A copy for every ratio, of the same shapes, in which `ratio` of the weights are zero (see masks.py)."""
    params, count = net.cost
    for ratio in ratios:
        masks = masks_of(net.model, recipe.method, ratio, net.seed, net.own, **recipe.option)
        masked = {name: net.tensors[name].masked_fill(~mask, 0) for name, mask in masks.items()}
        layers = tuple(layer_report(name, net.tensors[name], masked[name], mask) for name, mask in masks.items())
        report = Report(
            method=recipe.method,
            ratio=float(ratio),
            groups=(),
            frozen=(),
            params_before=params,
            params_after=params - sum(layer.before - layer.after for layer in layers),
            macs_before=count,
            macs_after=count,
            layers=layers,
            recipe=spell(recipe),
            plan=Plan(ChannelGroups(()), masks=masks),
        )
        yield remembered(resized(net.model, masked), net.model, report)


def smaller_copies(net: Network, recipe: Recipe, ratios: Sequence[float]) -> Iterator[Compressed]:
    """A copy for every ratio, in which every channel group has lost `ratio` of its channels, or as a budget says."""
    assert net.cost  # counted first: MACs of narrower networks follow from this count
    sizes = sizes_left(net, recipe, ratios)
    # One group at a time, keeping its choices alone: all Gram matrices of a large network do not fit in memory.
    plans = [
        choices(net, recipe, g, [sizes[ratio][i] for ratio in ratios], net.certify) for i, g in enumerate(net.groups)
    ]
    for ratio in ratios:
        # The copy gets no name here, so that only the caller holds it: two of a large network may not fit in memory.
        yield made(net, recipe, ratio, [of_group[k] for k, of_group in zip(sizes[ratio], plans, strict=True)])


def choices(
    net: Network, recipe: Recipe, group: ChannelGroup, sizes: Iterable[int], certify: bool = False
) -> dict[int, Choice]:
    """{size: projection that the method chooses for this group, and its row of the report}"""
    described, method = recipe.features, METHODS[recipe.method]
    looks, seen = method.activations, net.seen
    weights = GroupWeights(
        group,
        net.tensors,
        described.features,
        described.scale,
        described.norm,
        net.seed,
        seen.inputs if seen and looks else {},
        net.gradients,
        lambda: net.moments if net.blockwise and looks else {},
    )
    found = call(f"method {recipe.method!r}", method.choose, weights, sorted(set(sizes)), **recipe.option)
    proved = certificates(weights.gram, found) if certify else {}
    return {k: (projection, group_report(weights, projection, proved.get(k))) for k, projection in found.items()}


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


def made(net: Network, recipe: Recipe, ratio: float, chosen: Sequence[Choice]) -> Compressed:
    """The smaller network of these choices, one for each group, compensated where there are pictures."""
    plan = Plan(net.groups, [p for p, _ in chosen], recipe.merging.norm_scale, recipe.merging.approximate_repair)
    smaller = apply(
        net.model, plan.groups, plan.projections, plan.joint_norms, approximate_repair=plan.approximate_repair
    )
    compensated_(net, smaller, plan, recipe.calibration.ridge)
    report = Report(
        method=recipe.method,
        ratio=float(ratio),
        groups=tuple(row for _, row in chosen),
        frozen=net.groups.frozen,
        params_before=net.cost[0],
        params_after=parameters(smaller),
        macs_before=net.cost[1],
        macs_after=net.cost_of(smaller)[1],
        numbers=new_numbers(net.model, plan.groups, plan.projections),
        recipe=spell(recipe),
        plan=plan,
    )
    return remembered(smaller, net.model, report)


def compensated_(net: Network, smaller: nn.Module, plan: Plan, ridge: float | None = None) -> None:
    """In place: solve the readers of a smaller network for the target, where there are pictures."""
    if net.pictures is None:
        return
    if net.blockwise:
        compensate_blocks_(smaller, net.model, plan, net.pictures, ridge)
    elif net.seen:
        compensate_(smaller, net.model, plan, net.seen, ridge=ridge, target=net.target)


def usual_target(batches: Batches) -> str:
    """The target where a recipe names none: networks of tokens lose least by "same", all others by "mend"."""
    return "same" if batches.tokens else "mend"


def first_channels(size: int, left: int) -> Projection:
    return Projection(torch.where(torch.arange(size) < left, torch.arange(size), -1))


def channels_left(size: int, ratio: float, round_to: int = 1) -> int:
    """Channels that remain of `size`: rounded down, as the study does, but at least one.

    round_to: then to the nearest multiple of it, but at least one multiple and at most `size`.
    """
    left = max(1, int(size * (1 - ratio) + 1e-9))
    if left == size or round_to == 1:
        return left
    return min(size, max(1, (left + round_to // 2) // round_to) * round_to)


def protected(groups: ChannelGroups, names: Sequence[str]) -> list[ChannelGroup]:
    """The groups whose name begins with one of these. Raises UserError for one with which no group's name begins."""
    for name in names:
        check_beginning(f"protect: no group's name begins with {name!r}", name, [group.name for group in groups])
    return [group for group in groups if group.name.startswith(tuple(names))]


def check_groups(model: nn.Module, groups: ChannelGroups) -> None:
    """Raise UserError, naming frozen channels and why, where there is no group."""
    if not len(groups):
        frozen = "; ".join(map(str, groups.frozen[:3]))
        raise UserError(f"{type(model).__name__} has no channels that can be compressed ({frozen})")


def check_round_to(groups: ChannelGroups, round_to: int) -> None:
    """Raise UserError where no group has more channels than that, so that none could ever go."""
    largest = max(group.size for group in groups)
    if round_to >= largest:
        raise UserError(f"round_to {round_to} leaves all groups whole: the largest has {largest} channels; lower it")


def check_ratios(ratios: Sequence[float], round_to: int = 1) -> None:
    """Raise UserError for a round_to below 1, and naming the first ratio outside 0 <= ratio < 1."""
    if round_to < 1:
        raise UserError(f"round_to {round_to} must be at least 1 channel")
    for ratio in ratios:
        if not isinstance(ratio, Real):
            raise UserError(f"ratio {ratio!r} is no number: the fraction to remove is 0 <= ratio < 1")
        if not 0 <= ratio < 1:
            raise UserError(f"ratio {ratio} is out of range: the fraction to remove is 0 <= ratio < 1")


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise UserError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        # A sum is finite only where all entries are; the entries of one that is not may be finite and large.
        if tensor.is_floating_point() and not (tensor.sum().isfinite() or tensor.isfinite().all()):
            kind = "NaN" if tensor.isnan().any() else "Inf"
            raise UserError(f"{name} holds {kind}: training has diverged (lower the learning rate); not compressed")
