"""compress(model, example, method, ratio) -> a smaller model and a report of what was done to it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.compression.allocate import BUDGETS, SPARES, allocated
from pipeline.compression.batches import batches_of
from pipeline.compression.compensate import compensate_, observe
from pipeline.compression.copies import bare_copy
from pipeline.compression.gradients import Gradients
from pipeline.compression.graph import Example, call_arguments, channel_groups
from pipeline.compression.group import DEFAULT_PARTS, ChannelGroup, ChannelGroups, Frozen
from pipeline.compression.layers import other_units
from pipeline.compression.masks import MASKS, masks_of
from pipeline.compression.methods import METHODS, GroupWeights, Projections, check_pictures
from pipeline.compression.outputs import Answers, Outputs
from pipeline.compression.predict import judge
from pipeline.compression.projection import Projection, apply, named_tensors, new_numbers, resized
from pipeline.compression.synthetic import synthesize
from pipeline.tables import UserError, call, pick


@dataclass(frozen=True)
class GroupReport:
    """One group: channels before and after, and the relative parameter error ‖W - P W‖ / ‖W‖ of its features.

    labels: (before,) int64, the new channel of each old one, -1 = dropped.
    tie: the name that groups of one layer, such as its heads, have in common.
    """

    name: str
    before: int
    after: int
    error: float
    labels: torch.Tensor = field(repr=False, compare=False)
    tie: str = ""


@dataclass(frozen=True)
class LayerReport:
    """One masked weight: its entries before and those that the mask leaves, and the relative error ‖W - W'‖ / ‖W‖."""

    name: str
    before: int
    after: int
    error: float


@dataclass(frozen=True)
class Report:
    """What `compress` did. params: parameters; macs: multiply-accumulates of one forward pass on the example.

    Of a masked network `layers` stands in place of `groups`. Its params_after are the parameters that masks leave, and
    its macs_after are those of the dense network: that is what hardware computes where it cannot skip zeros.

    numbers: sizes that modules keep as Python numbers and that had to follow: {"blocks.0.attn.head_dim": 32}.
    """

    method: str
    ratio: float
    groups: tuple[GroupReport, ...]
    frozen: tuple[Frozen, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    layers: tuple[LayerReport, ...] = ()

    @property
    def error(self) -> float:
        """Mean relative parameter error over the groups, or over the masked weights."""
        of = self.groups or self.layers
        return sum(one.error for one in of) / len(of)

    def __str__(self) -> str:
        layers: dict[str, list[GroupReport | LayerReport]] = {}
        for one in self.groups or self.layers:
            tie = one.tie if isinstance(one, GroupReport) else ""
            layers.setdefault(tie or one.name, []).append(one)
        width = max(len(name) for name in layers)
        lines = [
            f"{self.method} at ratio {self.ratio:g}: "
            f"parameters {self.params_before:,} -> {self.params_after:,} "
            f"({self.params_after / self.params_before:.1%}), "
            f"MACs {self.macs_before:,} -> {self.macs_after:,} ({self.macs_after / max(1, self.macs_before):.1%})",
            f"{'group':<{width}}  channels  relative error"
            if self.groups
            else f"{'layer':<{width}}  weights  relative error",
            *(
                f"{name:<{width}}  {of[0].before:>4} -> {of[0].after:<4}  {sum(g.error for g in of) / len(of):.4f}"
                + (f"  (mean of {len(of)} groups)" if len(of) > 1 else "")
                for name, of in layers.items()
            ),
        ]
        return "\n".join([*lines, *(f"frozen: {f}" for f in self.frozen)])


AUTO = "auto"
CANDIDATES = ("fold+ar", "mix+ar", "mix", "l2")  # that it chooses from where there are no pictures, and where there are
COMPENSATED = ("mix", "fold", "l2", "obs")

# They multiply nothing that is counted, and on shapes would take half of the time of a count.
UNCOUNTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Counted = dict[tuple[Any, ...], int]  # MACs by the shapes of a network and of its inputs


class Compressed(NamedTuple):
    """A smaller model and the report of how it came about."""

    model: nn.Module
    report: Report


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
        zero and leave all shapes as they are; or "auto": the method that is foretold to leave the most accuracy.
    ratio: fraction of each group's channels to remove (for MASKS: of the weights), 0 <= ratio < 1, or a sequence of
        them; then a list comes back, and what the ratios can share is computed once.
    options: those of `compressions`, and those of the method (fold: refine; l1, l2: score; n_m: m).

    The input model is untouched. Raises UserError for an unknown method, a ratio out of range, weights that are not
    finite, a model that torch.export cannot trace (masks need no trace) and one that has nothing to compress.
    """
    if isinstance(ratio, (int, float)):
        return next(compressions(model, example, method, [ratio], **options))
    return list(compressions(model, example, method, ratio, **options))


def compressions(
    model: nn.Module, example: Example, method: str, ratios: Sequence[float], **options
) -> Iterator[Compressed]:
    """`compress` for several ratios, one at a time: an iterator, so that only one smaller model need be in memory.

    options: of a method in METHODS those of `smaller_copies`, of one in MASKS those of `masked_copies`, of "auto" those
    of `judged_copies`.
    """
    return pick("method", kinds(), method)(model, example, method, ratios, **options)


def kinds() -> dict[str, Callable[..., Iterator[Compressed]]]:
    """Every name of a method, and what makes its copies."""
    return {**dict.fromkeys(METHODS, smaller_copies), **dict.fromkeys(MASKS, masked_copies), AUTO: judged_copies}


def judged_copies(
    model: nn.Module,
    example: Example,
    method: str,
    ratios: Sequence[float],
    *,
    candidates: Sequence[str] | None = None,
    judge_on: Example | Iterable[Example] | None = None,
    pictures: Example | Iterable[Example] | None = None,
    answers: Answers | None = None,
    groups: ChannelGroups | None = None,
    parts: Sequence[str] = DEFAULT_PARTS,
    counted: Counted | None = None,
    seed: int = 0,
    **options,
) -> Iterator[Compressed]:
    """For every ratio the copy, of those by the candidates, that is foretold to be the most accurate (see predict.py).

    candidates: names in METHODS, also with "+ar" behind (approximate_repair); the first of them wins a tie.
    judge_on: network inputs that foretell it; None: the pictures that methods see, else synthetic ones (`synthesize`).
    The rest: of `smaller_copies`.
    """
    if "approximate_repair" in options:
        raise UserError(
            "auto decides on approximate_repair (+ar) by itself; give it candidates, such as [fold+ar, mix+ar]"
        )
    model = bare_copy(model, share=True).eval()
    groups = channel_groups(model, example, parts) if groups is None else groups
    pictures = None if pictures is None else batches_of(pictures)
    given = {"groups": groups, "pictures": pictures, "answers": answers, "counted": counted, "seed": seed, **options}
    makers = {}
    for name in candidates or (CANDIDATES if pictures is None else COMPENSATED):
        alone = name.removesuffix("+ar")
        pick("candidate", METHODS, alone)
        makers[name] = partial(smaller_copies, model, example, alone, approximate_repair=alone != name, **given)
    if judge_on is None:
        judge_on = synthesize(model, example, seed=seed) if pictures is None else pictures
    judged = judge(model, judge_on, answers)
    found = {
        (name, report.ratio): judged(smaller)
        for name, maker in makers.items()
        for smaller, report in maker(ratios=ratios)
    }
    for ratio in ratios:
        worth = {name: found[name, float(ratio)] for name in makers}
        best = max(worth, key=worth.__getitem__)
        smaller, report = next(makers[best](ratios=[ratio]))
        yield Compressed(smaller, replace(report, method=f"{method} ({best})"))


def masked_copies(
    model: nn.Module,
    example: Example,
    method: str,
    ratios: Sequence[float],
    *,
    seed: int = 0,
    counted: Counted | None = None,
    **options,
) -> Iterator[Compressed]:
    """A copy for every ratio, of the same shapes, in which `ratio` of the weights are zero (see masks.py).

    seed: of masks that are drawn. counted: as of `smaller_copies`. options: those of the mask (n_m: m); what is said of
    channels (parts, pictures, protect, ...) is refused.
    """
    check_ratios(ratios)
    model = bare_copy(model, share=True)
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}
    check_finite(tensors)
    params, count = parameters(model), macs(model, example, counted)
    for ratio in ratios:
        masks = masks_of(model, method, ratio, seed, **options)
        masked = {name: tensors[name].masked_fill(~mask, 0) for name, mask in masks.items()}
        layers = tuple(masked_report(name, tensors[name], masked[name], mask) for name, mask in masks.items())
        left = params - sum(layer.before - layer.after for layer in layers)
        report = Report(method, float(ratio), (), (), params, left, count, count, layers=layers)
        yield Compressed(resized(model, masked), report)


def masked_report(name: str, weight: torch.Tensor, masked: torch.Tensor, mask: torch.Tensor) -> LayerReport:
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    lost = float(torch.linalg.vector_norm(weight - masked, dtype=torch.float64))
    return LayerReport(name, mask.numel(), int(mask.sum()), lost / norm if norm else 0.0)


def smaller_copies(
    model: nn.Module,
    example: Example,
    method: str,
    ratios: Sequence[float],
    *,
    groups: ChannelGroups | None = None,
    parts: Sequence[str] = DEFAULT_PARTS,
    features: str = "writers+readers",
    scale: str = "tensor",
    norm: bool = False,
    norm_scale: bool = True,
    approximate_repair: bool = False,
    round_to: int = 1,
    seed: int = 0,
    pictures: Example | Iterable[Example] | None = None,
    answers: Answers | None = None,
    ridge: float | None = None,
    solve_on: str = "smaller",
    allocate: str = "uniform",
    spare: str | None = None,
    protect: Sequence[str] = (),
    full: Mapping[str, int] | None = None,
    units: str = "all",
    counted: Counted | None = None,
    **options,
) -> Iterator[Compressed]:
    """A copy for every ratio, in which every channel group has lost `ratio` of its channels.

    groups: what `channel_groups(model, example, parts)` gave for this architecture; traced anew when None.
    parts: what is compressed (see channel_groups): "hidden", "residual", and of attention "width" or "head".
    features, scale, norm: what describes a channel (see GroupWeights); both the folding and the reported error use it.
    norm_scale: merge a weight and its norm as one affine map (see projection.apply).
    approximate_repair: set the BatchNorm variances of merged channels by the weights (Fold-AR; see projection.apply);
        not with pictures, on which they are measured.
    round_to: leave a multiple of so many channels, the nearest to what the ratio says (faster on some hardware).
    seed: of methods that draw.
    pictures: unlabelled network inputs, or synthetic ones (`synthesize`), some hundred: one batch (what the model is
        called with), or a collection of batches that can be read again, such as a list. Methods then see activations
        (taylor, fisher: gradients), and what reads the channels is solved on them (ridge, solve_on: see compensate_).
    answers: output of the network -> (rows, classes), by which two networks are compared and labels drawn, so that a
        token of a text counts as a picture does; None: all outputs of a sample side by side.
    allocate: "uniform" (every group loses the same fraction), or a budget, "macs" or "params": no more of it is left
        than by uniform sizes, and groups that can spare more lose more (see allocate.py).
    spare: by what `allocate` says what a group can spare: "output" (of the network, on the pictures) or "parameters"
        (the method's own errors, without pictures); None: "output" where there are pictures.
    protect: names of groups that keep all their channels, or what these begin with ("layer1.", "conv1").
    full: {group name: channels} that ratios count from, of a network that has been made smaller before; None: its own.
    units: "filters" compresses only groups that convolutions write, "neurons" only those of linear layers (see
        layers.other_units); "all" of them.
    counted: MACs found so far for this architecture, added to: methods whose networks have the same sizes share them.
    """
    counted = {} if counted is None else counted
    choose = METHODS[method]
    check_pictures(method, pictures)
    check_ratios(ratios, round_to)
    if approximate_repair and pictures is not None:
        raise UserError("approximate_repair guesses variances that pictures measure: choose one of the two")
    model = bare_copy(model, share=True)  # hooks and masks of the live model stay out of the smaller ones
    groups = channel_groups(model, example, parts) if groups is None else groups
    check_groups(model, groups)
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}
    check_finite(tensors)
    seen = None if pictures is None else observe(model, groups, pictures)
    # Of gradients nothing is computed yet.
    gradients = None if seen is None else Gradients(model, groups, seen.pictures, seed, answers)

    def weights_of(group: ChannelGroup) -> GroupWeights:
        return GroupWeights(group, tensors, features, scale, norm, seed, seen.inputs if seen else {}, gradients)

    def chosen(weights: GroupWeights, sizes: Iterable[int]) -> Projections:
        return call(f"method {method!r}", choose, weights, sorted(set(sizes)), **options)

    def planned(group: ChannelGroup, sizes: Iterable[int]) -> dict[int, tuple[Projection, GroupReport]]:
        weights = weights_of(group)
        return {k: (p, reported(weights, p)) for k, p in chosen(weights, sizes).items()}

    def left_at(sizes: Sequence[int]) -> int:
        """What `allocate` counts of the network at these sizes, whichever channels they are."""
        smaller = apply(model, groups, [first_channels(g.size, k) for g, k in zip(groups, sizes, strict=True)])
        return parameters(smaller) if allocate == "params" else macs(smaller, example, counted)

    whole = [*protected(groups, protect), *other_units(model, groups, units)]
    sizes = {
        ratio: [
            g.size if g in whole else min(g.size, channels_left((full or {}).get(g.name, g.size), ratio, round_to))
            for g in groups
        ]
        for ratio in ratios
    }
    if allocate != "uniform":
        pick("allocate", dict.fromkeys(("uniform", *BUDGETS)), allocate)
        spare = spare or ("output" if seen else "parameters")
        pick("spare", dict.fromkeys(SPARES), spare)
        if spare == "output" and seen is None:
            raise UserError("spare=output compares outputs on pictures, so it needs pictures (or spare=parameters)")
        sizes = allocated(
            model,
            example,
            groups,
            (seen, Outputs(model, seen.pictures, answers)) if seen and spare == "output" else None,
            lambda group, of_group: {k: (p, row.error) for k, (p, row) in planned(group, of_group).items()},
            sizes,
            allocate,
            lambda size, left: channels_left(size, 1 - left, round_to),
            left_at,
        )
    # One group at a time, and of each only what is chosen: all Gram matrices of a large network at once do not fit.
    plans = [planned(group, [sizes[ratio][i] for ratio in ratios]) for i, group in enumerate(groups)]
    before = parameters(model), macs(model, example, counted)

    def narrowed(projections: Sequence[Projection]) -> nn.Module:
        smaller = apply(model, groups, projections, norm_scale, approximate_repair=approximate_repair)
        if seen:
            compensate_(
                smaller, model, groups, projections, seen, norm_scale=norm_scale, ridge=ridge, solve_on=solve_on
            )
        return smaller

    for ratio in ratios:
        plan = [plan[k] for k, plan in zip(sizes[ratio], plans, strict=True)]
        # Without a name here, so that only the caller holds it: two of a large network may not fit.
        yield _made(model, example, groups, plan, narrowed, counted, method, ratio, before)


def _made(
    model: nn.Module,
    example: Example,
    groups: ChannelGroups,
    plan: Sequence[tuple[Projection, GroupReport]],
    narrowed: Callable[[Sequence[Projection]], nn.Module],
    counted: Counted,
    method: str,
    ratio: float,
    before: tuple[int, int],
) -> Compressed:
    """before: parameters and MACs of the model"""
    projections, rows = [p for p, _ in plan], tuple(row for _, row in plan)
    smaller = narrowed(projections)
    report = Report(
        method=method,
        ratio=float(ratio),
        groups=rows,
        frozen=groups.frozen,
        params_before=before[0],
        params_after=parameters(smaller),
        macs_before=before[1],
        macs_after=macs(smaller, example, counted),
        numbers=new_numbers(model, groups, projections),
    )
    return Compressed(smaller, report)


def first_channels(size: int, left: int) -> Projection:
    return Projection(torch.where(torch.arange(size) < left, torch.arange(size), -1))


def reported(weights: GroupWeights, projection: Projection) -> GroupReport:
    group, labels = weights.group, projection.labels
    return GroupReport(group.name, group.size, len(projection.counts), weights.error(projection), labels, group.tie)


def channels_left(size: int, ratio: float, round_to: int = 1) -> int:
    """Channels that remain of `size`: rounded down, as the study does, but at least one.

    round_to: then to the nearest multiple of it, but at least one and at most what there is.
    """
    left = max(1, int(size * (1 - ratio) + 1e-9))
    if left == size or round_to == 1:
        return left
    return min(size, max(1, (left + round_to // 2) // round_to) * round_to)


def protected(groups: ChannelGroups, names: Sequence[str]) -> list[ChannelGroup]:
    """The groups whose name begins with one of these. UserError for one that is no group's."""
    for name in names:
        if not any(group.name.startswith(name) for group in groups):
            known = ", ".join(dict.fromkeys(group.tie or group.name for group in groups))
            raise UserError(f"protect: no group's name begins with {name!r}; there are {known}")
    return [group for group in groups if group.name.startswith(tuple(names))]


def check_groups(model: nn.Module, groups: ChannelGroups) -> None:
    """Raise UserError, naming what froze, where there is nothing to compress."""
    if not len(groups):
        frozen = "; ".join(map(str, groups.frozen[:3]))
        raise UserError(f"{type(model).__name__} has no channels that can be compressed ({frozen})")


def check_ratios(ratios: Sequence[float], round_to: int = 1) -> None:
    """Raise UserError naming the first ratio that is no fraction to remove, or a round_to of no channels."""
    if round_to < 1:
        raise UserError(f"round_to {round_to} must be at least 1 channel")
    for ratio in ratios:
        if not 0 <= ratio < 1:
            raise UserError(f"ratio {ratio} is out of range: the fraction to remove is 0 <= ratio < 1")


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise UserError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            kind = "NaN" if tensor.isnan().any() else "Inf"
            raise UserError(f"{name} holds {kind}: training has diverged (lower the learning rate); not compressed")


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, example: Example, counted: Counted | None = None) -> int:
    """Multiply-accumulates of one forward pass on `example` (convolutions, linear layers, attention).

    Counted on shapes alone, with nothing computed, or by a real pass where the forward looks at values.
    counted: what was found on shapes for networks of one architecture, looked up and added to. On a small network a
        count takes as long as a forward pass of some hundred pictures.
    """
    counted = {} if counted is None else counted
    shapes = _shapes(model, example)
    try:
        if shapes not in counted:
            counted[shapes] = _macs(model, example, "meta")
        return counted[shapes]
    except Exception:  # a forward may do anything; what is wrong with the model itself raises again
        return _macs(model, example, None)


def _shapes(model: nn.Module, example: Example) -> tuple[Any, ...]:
    """Of all tensors that a forward pass sees, and those of its arguments that are none."""
    args, kwargs = call_arguments(example)
    given = torch.utils._pytree.tree_leaves((args, dict(sorted(kwargs.items()))))
    shaped = [tuple(v.shape) if isinstance(v, torch.Tensor) else repr(v) for v in given]
    return (*shaped, *(tuple(t.shape) for t in named_tensors(model).values()))


def _macs(model: nn.Module, example: Example, device: str | None) -> int:
    """`macs` with the weights and inputs on `device` (None: where they are).

    The pass runs on a twin, so that what a forward stores (a mask, a cache) and eval mode stay out of the live model.
    """

    def moved(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, torch.Tensor) else value

    memo: dict[int, Any] = {id(t): moved(t) for t in model.buffers()}
    memo |= {id(t): nn.Parameter(moved(t), requires_grad=False) for t in model.parameters()}
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        if device == "meta" and type(module) in UNCOUNTED:
            module.forward = lambda input: input
    args, kwargs = torch.utils._pytree.tree_map(moved, call_arguments(example))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(*args, **kwargs)
    return counter.get_total_flops() // 2
