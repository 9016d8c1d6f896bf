"""Compression as a stage: a compression recipe at a ratio."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.compression import Recipe, compressions, parse, spell
from pipeline.compression.calibrate.predict import PICTURES
from pipeline.compression.checks import check_groups, check_ratios, check_round_to, protected
from pipeline.compression.choose.layers import other_units
from pipeline.compression.choose.masks import maskable
from pipeline.compression.recipe import AUTO, Calibration, about
from pipeline.example import Example
from pipeline.stages.stage import CALIBRATION, Seen, State, Supplies, Terms, Traces, number_text
from pipeline.tables import UserError


@dataclass(frozen=True)
class Compress:
    """A compression recipe at a ratio: the fraction of the channels (masks: of the weights) to remove, 0 <= r < 1."""

    recipe: Recipe
    ratio: float

    terms = Terms(before="sets")

    def __post_init__(self) -> None:
        check_ratios([self.ratio])

    @classmethod
    def parsed(cls, text: str) -> "Compress":
        """The stage that a text such as "mix+data@0.5" spells. UserError where the recipe or the ratio is wrong."""
        spelling, _, ratio = text.rpartition("@")
        try:
            return cls(parse(spelling.strip()), float(ratio))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{text!r}: the ratio behind @ must be a number, got {ratio!r}") from error

    def __str__(self) -> str:
        return f"{spell(self.recipe)}@{number_text(self.ratio)}"

    @property
    def needs(self) -> frozenset[str]:
        return needs(self.recipe)

    @property
    def version(self) -> int | None:
        """1 saw 128 synthetic pictures where the recipe does not say how many."""
        calibration = self.recipe.calibration
        return 2 if calibration.pictures == "synthetic" and calibration.size is None else None

    @property
    def facts(self) -> dict[str, str]:
        """The kind and the scope of a row stay those of the first compression of its chain."""
        said, usual = about(self.recipe), about(Recipe("fold"))
        return {name: said[name] for name in ("calibration", "sizes", "statistics") if said[name] != usual[name]}

    def reason_against(self, model: nn.Module) -> str:
        return ""

    def check(self, supplies: Supplies) -> None:
        """UserError as for `check_recipe`, and for a calibration that asks for more samples than there are."""
        check_recipe(self.recipe, supplies.dense, supplies.example, supplies.traces)
        if supplies.batches and self.recipe.calibration.pictures == "data":
            supplies.pictures(self.recipe.calibration)

    def seen(self, supplies: Supplies) -> Seen:
        calibration = self.recipe.calibration
        return Seen(calibration.size or min(CALIBRATION, supplies.samples) if calibration.pictures == "data" else 0)

    def run(self, state: State, supplies: Supplies) -> State:
        return next(compressed(state, self.recipe, [self.ratio], supplies))


def check_recipe(recipe: Recipe, net: nn.Module, example: Example, traces: Traces) -> None:
    """UserError where the network has nothing that the recipe could compress."""
    if recipe.kind == "mask":
        maskable(net)
        return
    groups = traces.of(net, example, recipe.scope.parts)
    check_groups(net, groups)
    check_round_to(groups, recipe.sizes.round_to)
    other_units(net, groups, recipe.scope.units)
    protected(groups, recipe.sizes.protect)


def needs(recipe: Recipe) -> frozenset[str]:
    """Those of stage.NEEDS that a recipe draws on."""
    return frozenset({"calibration"} if recipe.calibration.pictures == "data" else ())


def compressed(
    state: State,
    recipe: Recipe,
    ratios: Sequence[float],
    supplies: Supplies,
    full: Mapping[str, int] | None = None,
    own: Mapping[str, float] | None = None,
) -> Iterator[State]:
    """The network at every ratio, one at a time; work that ratios share is done once.

    full: {group name: channels} that ratios count from; None: the network's own channels.
    own: {beginning of a group's or a masked weight's name: its own ratio}.
    """
    given = {"pictures": supplies.pictures(recipe.calibration)}
    if recipe.kind != "mask":
        given |= {"groups": supplies.traces.of(state.model, supplies.example, recipe.scope.parts), "full": full}
    if recipe.method == AUTO and given["pictures"] is None:
        given["judge_on"] = supplies.pictures(Calibration("synthetic", PICTURES))
    shared: dict[str, Any] = {"counted": supplies.traces.counted, "seed": supplies.seed, "own": own}
    shared |= {"answers": supplies.task.answers, "certify": supplies.certify}
    made = compressions(state.model, supplies.example, recipe, ratios, **shared, **given)
    # No generator, whose names would keep a network alive until the next one is made.
    return map(lambda smaller: State(smaller.model, smaller.report, state.model, plan=smaller.report.plan), made)
