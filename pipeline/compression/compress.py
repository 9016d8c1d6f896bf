"""compress(model, example, method, ratio) -> a smaller model and a report of what was done to it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import nn

from pipeline.compression.budget import sizes_left
from pipeline.compression.calibrate.batches import Batches, batches_of
from pipeline.compression.calibrate.outputs import Answers
from pipeline.compression.calibrate.predict import PICTURES, judge
from pipeline.compression.calibrate.synthetic import synthesize
from pipeline.compression.calibrate.texts import unigram_texts, written_texts
from pipeline.compression.checks import check_finite, check_groups, check_ratios
from pipeline.compression.choose.layers import check_own
from pipeline.compression.choose.masks import masks_of
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import ChannelGroups
from pipeline.compression.merge.modules import apply, named_tensors, new_numbers, resized
from pipeline.compression.network import Choice, Network, choices, compensated_
from pipeline.compression.plan import Plan, history, went_through_
from pipeline.compression.recipe import AUTO, Calibration, Recipe, parse, recipe, spell
from pipeline.compression.report import Report, layer_report, step_of
from pipeline.compression.sizes.count import Counted, parameters
from pipeline.compression.trace.graph import channel_groups
from pipeline.example import Example
from pipeline.tables import UserError

# Candidates of the method "auto" without pictures, and with them.
CANDIDATES = ("fold+ar", "mix+ar", "mix", "l2")
COMPENSATED = ("mix", "fold", "l2", "obs")


class Compressed(NamedTuple):
    """A smaller model and the report of how it came about."""

    model: nn.Module
    report: Report


def remembered(smaller: nn.Module, model: nn.Module, report: Report) -> Compressed:
    """The smaller network and its report. Its history becomes the model's, followed by this compression."""
    went_through_(smaller, (*history(model), step_of(report)))
    return Compressed(smaller, report)


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
        judge_on = net.pictures
        if judge_on is None:
            judge_on = synthesize(net.model, net.example, PICTURES, seed=net.seed)
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


def usual_target(batches: Batches) -> str:
    """The target where a recipe names none: networks of tokens lose least by "same", all others by "mend"."""
    return "same" if batches.tokens else "mend"
