"""Measures how honest the study's intervals and sentences are, on made sweeps whose true effects are known.

    python -m benchmarks.honesty                # 1,000 draws of each world: ten minutes on one core
    python -m benchmarks.honesty --draws 100

A world is a grid of recipes with known effects, interactions and noise. Each draw of its noise goes the whole way, from
the cells to the sentences. Coverage: the share of 95% intervals that hold the true effect, over all lines of `effects`
(of interactions for differences). False: the share of draws with at least one sentence that asserts an effect, a sign,
a change of sign or an interaction that is not there.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.common import write
from pipeline.study.claims import Claim, weighed
from pipeline.study.effects import effects, pairs
from pipeline.study.interactions import interactions
from pipeline.study.lines import Lines
from pipeline.study.matching import ABSENT
from pipeline.study.noise import noise
from pipeline.tasks import METRICS

RESULTS = Path(__file__).parent / "results"
OUTCOMES = ("fold", "base", "prune")
PLACE = ("repaired", 0.5)
TINY = 1e-9  # rounding of a true zero
TWO = (0.0, 1.0)


@dataclass(frozen=True)
class World:
    """A made sweep.

    levels: {setting: its levels}; a setting "only under another" is null elsewhere (`nested`)
    steps: {setting: (fold, base, prune)}: what a step from one level to the next adds, in points
    crossed: {(setting, other): what a step of the setting adds to fold at other's first level, at its others}
    seeds: cells of a recipe; seed_sd: noise of a cell; recipe_sd: noise that a recipe's cells share; slope_sd: spread
        of each setting's effect over recipes, drawn anew in each draw; tail: degrees of freedom of Student's t noise
    missing: share of the recipes that were never trained, the same in all draws
    """

    levels: dict[str, tuple[float | None, ...]]
    steps: dict[str, tuple[float, float, float]]
    crossed: dict[tuple[str, str], tuple[float, float]]
    seeds: int = 1
    seed_sd: float = 2.0
    recipe_sd: float = 0.0
    slope_sd: float = 0.0
    tail: float = np.inf
    missing: float = 0.0
    nested: tuple[str, str, float] | None = None

    @cached_property
    def recipes(self) -> pl.DataFrame:
        """The grid, one line per recipe: a column for each setting."""
        grid = [dict(zip(self.levels, values, strict=True)) for values in product(*self.levels.values())]
        if self.nested is not None:
            inner, outer, level = self.nested
            grid = [line if line[outer] == level else line | {inner: None} for line in grid]
        table = pl.DataFrame(grid, schema=dict.fromkeys(self.levels, pl.Float64)).unique(maintain_order=True)
        return table.filter(np.random.default_rng(0).random(len(table)) >= self.missing)

    @cached_property
    def expected(self) -> np.ndarray:
        """(R, 3) fold, base and prune of each recipe, without noise."""
        places = {name: self._places(name) for name in self.levels}
        values = np.tile([60.0, 90.0, 50.0], (len(self.recipes), 1))
        for name, step in self.steps.items():
            values += np.outer(places[name], step)
        for (setting, other), (first, others) in self.crossed.items():
            values[:, 0] += places[setting] * np.where(places[other] == 0, first, others)
        return values

    def _places(self, setting: str) -> np.ndarray:
        order = sorted(value for value in set(self.levels[setting]) if value is not None)
        return np.array([0 if value is None else order.index(value) for value in self.recipes[setting]], np.float64)

    @cached_property
    def truth(self) -> Lines:
        """The sweep without noise, one cell a recipe."""
        return self._lines(self.expected, 1)

    def draw(self, rng: np.random.Generator) -> Lines:
        """The sweep with noise."""
        n = len(self.recipes)
        values = self.expected + self.recipe_sd * rng.standard_normal((n, 3))
        if self.slope_sd:
            places = np.stack([self._places(name) for name in self.levels], axis=1)
            values += self._slopes(rng, places)
        noise = rng.standard_normal((n, self.seeds, 3))
        if np.isfinite(self.tail):
            noise = rng.standard_t(self.tail, noise.shape) / np.sqrt(self.tail / (self.tail - 2))
        return self._lines((values[:, None] + self.seed_sd * noise).reshape(-1, 3), self.seeds)

    def _slopes(self, rng: np.random.Generator, places: np.ndarray) -> np.ndarray:
        """(R, 3): a setting's effect differs between the recipes of all other settings; mean 0 over such recipes."""
        total = np.zeros((len(places), 3))
        for setting in range(places.shape[1]):
            others = np.unique(np.delete(places, setting, axis=1), axis=0, return_inverse=True)[1].ravel()
            slopes = self.slope_sd * rng.standard_normal((others.max() + 1, 3))
            total += places[:, setting, None] * slopes[others]
        return total

    def _lines(self, values: np.ndarray, seeds: int) -> Lines:
        n = len(self.recipes)
        repeated = self.recipes.select(pl.all().repeat_by(seeds).explode()) if seeds > 1 else self.recipes
        table = repeated.with_columns(
            cell=pl.Series([f"{i}" for i in range(n * seeds)]),
            recipe=pl.Series(np.repeat(np.arange(n), seeds)).cast(pl.String),
            seed=pl.Series(np.tile(np.arange(seeds), n)),
            stage=pl.lit(PLACE[0]),
            ratio=pl.lit(PLACE[1]),
            **{name: pl.Series(values[:, i]) for i, name in enumerate(OUTCOMES)},
        ).with_columns(gap=pl.col("fold") - pl.col("prune"))
        return Lines(table, pl.DataFrame(), tuple(self.levels), METRICS["acc"])


NOTHING = World(dict.fromkeys("abcde", TWO), {}, {})
LARGER = World(dict.fromkeys("abcdef", TWO), {}, {})
WORLDS = {
    "nothing": NOTHING,
    "effects": replace(NOTHING, steps={"a": (4, 0, 4), "b": (-3, 1, 0), "c": (0, 2, 0)}),
    "heavy tails": replace(NOTHING, steps={"a": (4, 0, 4)}, tail=4.0),
    "missing, nested, three levels": World(
        {"lr": (0.001, 0.01, 0.1), "optim": TWO, "momentum": (0.9, 0.99), "l1": TWO, "sam": (0.0, 0.05, 0.1)},
        {"lr": (3, 1, 0), "momentum": (2, 0, 2)},
        {},
        missing=0.15,
        nested=("momentum", "optim", 1.0),
    ),
    "a sign that changes": replace(LARGER, crossed={("a", "b"): (-4, 4)}),
    "an effect in one half": replace(LARGER, crossed={("a", "b"): (0, 6), ("c", "d"): (0, -6)}),
    "seeds": replace(NOTHING, steps={"a": (3, 0, 3)}, seeds=3, recipe_sd=1.0),
    "effects that differ by recipe": replace(NOTHING, steps={"a": (4, 0, 4)}, slope_sd=1.5),
}


def true_effect(world: World, line: dict[str, object]) -> float:
    """Mean over the matched pairs of a line of `effects`, without noise."""
    table = world.truth.at(*PLACE)
    if line["over"]:
        level = dict(part.split("=") for part in line["where"].split(", "))[line["over"]]
        table = table.filter(pl.col(line["over"]).eq_missing(None if level == ABSENT else float(level)))
    found = pairs(table, line["setting"], world.truth.settings, line["low"], line["high"])
    return found[line["outcome"]].mean()


def is_false(world: World, claim: Claim, differences: pl.DataFrame) -> bool:
    """Does a sentence assert what is not so? differences: of `interactions` without noise."""
    step = {"setting": claim.setting, "low": claim.low, "high": claim.high}
    own = differences.filter([pl.col(name) == value for name, value in step.items()], pl.col("other") == claim.other)
    if claim.kind == "interaction":
        return own["difference"].abs().max() < TINY
    if claim.kind == "flip":
        halves = np.concatenate([own["effect_low"], own["effect_high"]])
        return not (halves.min() < -TINY and halves.max() > TINY)
    effect = true_effect(world, {**step, "outcome": claim.outcome, "over": ""})
    return abs(effect) < TINY or np.sign(effect) not in claim.signs


@dataclass(frozen=True)
class Verdict:
    """What came out of the draws of one world.

    covered: {"effects", "differences", "reliability": share of intervals that hold the truth, None: no intervals}
    false: share of the draws with a false sentence; flips, means: share of those that say both halves where a sign
        changes, and of those that say the mean over such halves
    """

    draws: int
    covered: dict[str, float | None]
    false: float
    flips: float
    means: float


def verdict(world: World, draws: int, seed: int = 0) -> Verdict:
    rng = np.random.default_rng(seed)
    exact = {outcome: interactions(world.truth, *PLACE, outcome) for outcome in ("fold", "gap")}
    known: dict[tuple[object, ...], float] = {}
    reliable = (world.recipe_sd**2 + expected_variance(world)) if world.seeds > 1 else None
    hits: dict[str, list[bool]] = {"effects": [], "differences": [], "reliability": []}
    turning = {setting for (setting, _), (first, others) in world.crossed.items() if first * others < 0}
    false, flips, means = 0, 0, 0
    for _ in range(draws):
        found = world.draw(rng)
        table, across = effects(found, *PLACE), interactions(found, *PLACE)
        for line in table.drop_nulls("half").to_dicts():
            key = tuple(line[name] for name in ("setting", "low", "high", "outcome", "where"))
            known[key] = true_effect(world, line) if key not in known else known[key]
            hits["effects"].append(abs(line["effect"] - known[key]) <= line["half"])
        off = (across["difference"] - exact["fold"]["difference"]).abs()
        hits["differences"] += (off <= across["half"]).drop_nulls().to_list()
        if reliable is not None:
            one = noise(found, *PLACE)["fold"]
            hits["reliability"].append(one.low <= reliable / (reliable + world.seed_sd**2) <= one.high)
        sure = [claim for claim in weighed(table, across, found.metric) if claim.sure]
        false += any(is_false(world, claim, exact[claim.outcome]) for claim in sure)
        flips += any(claim.kind == "flip" and claim.outcome == "fold" for claim in sure)
        means += any(claim.kind == "effect" and claim.outcome == "fold" and claim.setting in turning for claim in sure)
    covered = {name: float(np.mean(found)) if found else None for name, found in hits.items()}
    return Verdict(draws, covered, false / draws, flips / draws, means / draws)


def expected_variance(world: World) -> float:
    """Variance between the recipes that their settings make, as an analysis of variance of these recipes sees it."""
    return float(world.expected[:, 0].var(ddof=1))


def page(verdicts: dict[str, Verdict]) -> str:
    lines = [
        "# Made sweeps: do intervals cover, and are sentences true?",
        f"{next(iter(verdicts.values())).draws:,} draws of each world. Written by `python -m benchmarks.honesty`.",
        "",
        "| world | effects covered | differences covered | reliability covered | draws with a false sentence |"
        " both halves said | a mean said |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in verdicts.items():
        covered = " | ".join("-" if share is None else f"{share:.1%}" for share in one.covered.values())
        turned = f"{one.flips:.1%} | {one.means:.1%}" if WORLDS[name].crossed else "- | -"
        lines.append(f"| {name} | {covered} | {one.false:.1%} | {turned} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--out", type=Path, default=RESULTS / "honesty")
    told = parser.parse_args(arguments)
    verdicts = {name: verdict(WORLDS[name], told.draws) for name in told.worlds}
    write(told.out, {name: vars(one) for name, one in verdicts.items()}, page(verdicts))


if __name__ == "__main__":
    main()
