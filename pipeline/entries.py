"""What is measured of one network: every method at every ratio, and behind each of these networks every stage.

`chains(methods, ratios, stages)` is short for a tree of chains. Its nodes are entries, a row each.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from pipeline.compression import Recipe
from pipeline.compression.checks import check_ratios
from pipeline.compression.group import DEFAULT_PARTS
from pipeline.compression.plan import history
from pipeline.compression.recipe import about, recipes
from pipeline.data.corruptions import Corruptions
from pipeline.data.corruptions import corruptions as corruptions_of
from pipeline.example import Example
from pipeline.results import DENSE
from pipeline.sharpness import Sharpness, asked_for
from pipeline.stages import TAILS, Chain, Compress, Supplies, Traces, check_stage, fitting, needed, parse_tail
from pipeline.stages.compress import check_recipe, needs
from pipeline.tables import UserError, call
from pipeline.tasks import Task


class Entry(NamedTuple):
    """The network that one row is about; the uncompressed one is (DENSE, 0.0, "raw")."""

    method: str
    ratio: float
    stage: str

    def __str__(self) -> str:
        return f"{self.method} at ratio {self.ratio:g} ({self.stage})"

    @property
    def file(self) -> str:
        """File name for the network of this entry."""
        stage = re.sub(r"\s*>\s*", ">", self.stage)
        name = f"{self.method}-r{self.ratio:g}-{stage}"
        # Other characters are written as in addresses, so that no two labels have one file.
        return re.sub(r"[^\w.+=,@()\[\]-]", lambda found: f"%{ord(found[0]):02X}", name) + ".safetensors"


@dataclass(frozen=True)
class Chains:
    """Every compression recipe at every ratio, and behind each of these networks every stage.

    recipes: {label in the rows: recipe}. stages: names of TAILS, or chains spelled out. seed: for methods that draw.
    predict: foretell on synthetic pictures how well every network will do (see predict.py).
    sharpness, corruptions: measured of every network beside the metrics of the task; None: not.
    """

    recipes: Mapping[str, Recipe]
    ratios: tuple[float, ...]
    stages: tuple[str, ...]
    seed: int = 0
    predict: bool = False
    sharpness: Sharpness | None = None
    corruptions: Corruptions | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Those of stages.NEEDS that the chains draw on: training samples, and their labels."""
        labelled = frozenset({"labels"} if self.sharpness else ())
        return labelled.union(*map(needs, self.recipes.values()), *map(needed, self.stages))

    def entries(self, net: nn.Module) -> list[Entry]:
        """The entries to measure, in the order of the rows; stages that the network has nothing for are left out."""
        stages = [stage for stage in self.stages if fitting(stage, net) is not None]
        smaller = [Entry(label, ratio, stage) for label in self.recipes for ratio in self.ratios for stage in stages]
        return [Entry(DENSE, 0.0, "raw"), *smaller]


def chains(
    methods: Sequence[str] | Mapping[str, Mapping[str, Any] | None],
    ratios: Sequence[float],
    stages: Sequence[str] = ("raw",),
    round_to: int = 1,
    seed: int = 0,
    parts: Sequence[str] = DEFAULT_PARTS,
    predict: bool = False,
    **more: Any,
) -> Chains:
    """The chains of methods x ratios x stages.

    methods: spellings ("fold", "mix+data", "l1+grail"), or {label: {"method": name, options of a compression recipe}}
    ratios: fractions of channels to remove (masks: of weights), 0 <= r < 1
    stages: names of TAILS, or chains behind a compression ("repair > tune_norms(lr=0.01)")
    round_to, parts: for methods that do not set their own; masks take neither
    more: sharpness, options of pipeline.sharpness.Sharpness; corruptions, names of pipeline.data.corruptions, or
        options of its Corruptions; None: neither is measured

    Raises UserError for names that are in no table and for options that contradict each other.
    """
    for name, values in {"methods": methods, "ratios": ratios, "stages": stages, "parts": parts}.items():
        if values is None or isinstance(values, str | float | int):
            raise UserError(f"{name} must be a list, such as [{values or '...'}], got {values!r}")
    found = recipes(methods, round_to=round_to, parts=tuple(parts))
    if DENSE in found:
        raise UserError(f"method label {DENSE!r} is taken by the uncompressed network; choose another")
    check_ratios(ratios, round_to)
    for stage in stages:
        parse_tail(stage)
    for name, values in {"methods": list(methods), "ratios": [*map(float, ratios)], "stages": list(stages)}.items():
        if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise UserError(f"{name} has {twice[0]} twice; leave one out")
    if not found or not ratios or not stages:
        raise UserError("compression needs at least one method, one ratio and one stage")
    named = [stage for stage in TAILS if stage in stages]
    ordered = (*named, *(stage for stage in dict.fromkeys(stages) if stage not in TAILS))
    beside = call("compression", measured_beside, **more)
    return Chains(found, tuple(sorted(map(float, ratios))), ordered, seed, predict, **beside)


def measured_beside(
    sharpness: Mapping[str, Any] | bool | None = None, corruptions: Sequence[str] | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of Chains that say what is measured beside the metrics."""
    return {"sharpness": asked_for(sharpness), "corruptions": corruptions_of(corruptions)}


def trace(chains: Chains, net: nn.Module, example: Example, task: Task, traces: Traces) -> None:
    """Find the channel groups of this network now; masks need none.

    UserError where there is nothing to compress, and for a stage that was spelled out and could not be done.
    """
    chains.entries(net)
    for recipe in chains.recipes.values():
        check_recipe(recipe, net, example, traces)
    supplies = Supplies(net, example, task, seed=chains.seed, traces=traces)
    for stage in {stage: None for name in chains.stages for stage in fitting(name, net) or ()}:
        check_stage(stage, supplies)


def check_sizes(chains: Chains, repair_size: int) -> None:
    """UserError for a calibration that asks for more training samples than repair sees, which is all there are."""
    tails = [stage for name in chains.stages for stage in parse_tail(name)]
    recipes = [*chains.recipes.values(), *(stage.recipe for stage in tails if isinstance(stage, Compress))]
    for size in (recipe.calibration.size for recipe in recipes if recipe.calibration.pictures == "data"):
        if size is not None and size > repair_size:
            raise UserError(
                f"size={size} asks for more samples than repair_size={repair_size} draws; raise repair_size="
            )


def facts(chains: Chains, live: nn.Module, entries: Sequence[Entry]) -> dict[Entry, dict[str, str]]:
    """{entry: the typed columns of its row that say what it is about: kind, chain, calibration, ...}"""
    before = [str(step) for step in history(live)]
    found = {}
    for entry in entries:
        if entry.method == DENSE:
            found[entry] = {"kind": DENSE, "chain": " > ".join(before)}
            continue
        recipe, tail = chains.recipes[entry.method], fitting(entry.stage, live) or ()
        chain = " > ".join([*before, *map(str, (Compress(recipe, entry.ratio), *tail))])
        behind = {name: said for stage in tail for name, said in stage.facts.items()}
        found[entry] = {**about(recipe), **behind, "chain": chain}
    return found


def until_compressed(tail: Chain) -> Chain:
    """The stages up to the last compression among them; none where there is none."""
    return tail[: max((i + 1 for i, stage in enumerate(tail) if isinstance(stage, Compress)), default=0)]
