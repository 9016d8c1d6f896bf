"""Is foldability foretold on networks of our own? A part of docs/own_study.md, which `benchmarks.seeds` writes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.stats import norm

from benchmarks.common import line
from pipeline.study.intervals import holm
from pipeline.study.lines import Lines, lines
from pipeline.study.matching import design
from pipeline.study.prediction import Asked, predictions
from pipeline.study.sweep import Sweep

HALF = 0.5
STAGES = ("raw", "repaired")
FEWEST = 8  # recipes: so many there are, and the intervals show what so few are worth
MODEL = "forest"  # that of the page on the published study
SETS = {
    "none": "mean of the others",
    "base": "dense accuracy alone",
    "settings": "settings",
    "settings + base": "settings and dense accuracy",
    "extra": "features of the checkpoint",
    "settings + base + extra": "all of these",
}
INTRODUCTION = (
    "Can what folding leaves be foretold before anything is folded? Features of the checkpoint need no data "
    "(`pipeline.features`): norms and kurtosis of weights, gains and shifts of BatchNorm, heights of the groups' "
    "dendrograms, effective ranks, and fidelity on synthetic pictures. A random forest foretells networks whose recipe "
    "was held out, or all networks of one level of a setting. R² is the share of the variance that is foretold (below "
    "0: worse than the mean), error the mean absolute one in points, both with 95% intervals over recipes (bootstrap); "
    "regret: points lost to the better of folding and pruning, by choosing by the foretold sign of the gap; ceiling: "
    "the R² that settings can reach at most, because seeds of a recipe differ."
)


def part(sweep: Sweep) -> list[str]:
    """The lines of the part; sweep: with features of its cells."""
    found = lines(sweep)
    made = ["## Foretold", "", INTRODUCTION]
    for stage in STAGES:
        table = predictions(found, stage, HALF, sweep.features, Asked((MODEL,), fewest=FEWEST))
        n, recipes = table["n"][0], table["recipes"][0]
        made += ["", f"At half of the channels, {stage}; {n} networks of {recipes} recipes, a recipe held out:", ""]
        made += [*by_recipe(table), "", f"At half of the channels, {stage}, R² with all of a level held out:", ""]
        made += by_level(table, design(found.at(stage, HALF), found.settings, ["fold"]).settings)
    return [*made, "", *within_part(found, sweep.features)]


def by_recipe(table: pl.DataFrame) -> Iterator[str]:
    """Scores where recipes are held out, a line for each set of features."""
    columns = ["R² of folded", "error", "R² of gap", "error", "regret"]
    yield line("foretold from", columns)
    yield "|---" * (1 + len(columns)) + "|"
    at = table.filter(pl.col("held_out") == "recipe")
    for name, title in SETS.items():
        fold, gap = (one(at, features=name, target=target) for target in ("fold", "gap"))
        scores = [told(of, score) for of in (fold, gap) for score in ("r2", "mae")]
        yield line(title, [*scores, f"{gap['regret']:.2f}"])
    always = one(at, model="always fold")
    yield line("always fold", ["-"] * 4 + [f"{always['regret']:.2f}"])
    ceilings = {target: one(at, features="none", target=target)["ceiling"] for target in ("fold", "gap")}
    yield line("ceiling of settings", [f"{ceilings['fold']:.2f}", "-", f"{ceilings['gap']:.2f}", "-", "-"])


def by_level(table: pl.DataFrame, settings: tuple[str, ...]) -> Iterator[str]:
    """R² of the folded accuracy where the levels of a setting are held out, a line for each of these settings."""
    at = table.filter(pl.col("target") == "fold")
    sets = {name: title for name, title in SETS.items() if name != "none"}
    yield line("setting held out", list(sets.values()))
    yield "|---" * (1 + len(sets)) + "|"
    for setting in settings:
        yield line(setting, [told(one(at, held_out=setting, features=name), "r2") for name in sets])


def one(table: pl.DataFrame, **which: str) -> dict:
    """The one line; of the features "none" that of the mean."""
    if which.get("features") == "none":
        which |= {"model": "mean"}
    return table.row(by_predicate=pl.all_horizontal(pl.col(k) == v for k, v in which.items()), named=True)


def told(of: dict, score: str) -> str:
    """ ".79 (.51 to .90)" """
    digits = 2 if score == "r2" else 1
    return f"{of[score]:.{digits}f} ({of[f'{score}_low']:.{digits}f} to {of[f'{score}_high']:.{digits}f})"


# --- seeds of one recipe, which no setting tells apart

WITHIN = (
    "Does a feature tell the seeds of one recipe apart, which no setting does? Pearson's correlation of feature and "
    "folded accuracy at half of the channels, each less the mean of its recipe, over {n} networks (95% interval by "
    "Fisher's transform, with a degree of freedom less for each recipe; bold: survives Holm's correction over all "
    "{tests} correlations)."
)


class Within(NamedTuple):
    """A correlation within recipes, its 95% interval, and p (two-sided, of no correlation)."""

    r: float
    low: float
    high: float
    p: float


def within_part(found: Lines, features: pl.DataFrame) -> list[str]:
    """What is measured, and a line for each feature, the largest correlation first."""
    names = [name for name in features.columns if name != "cell"]
    tables = [found.at(stage, HALF).join(features, on="cell").drop_nulls("fold") for stage in STAGES]
    every = [[within(table, name) for table in tables] for name in names]
    sure = holm(np.array([one.p for both in every for one in both])).reshape(-1, len(STAGES)) < 0.05
    ordered = sorted(zip(names, every, sure, strict=True), key=lambda row: -max(abs(one.r) for one in row[1]))
    said = WITHIN.format(n=len(tables[0]), tests=sure.size)
    made = [said, "", line("within recipes", list(STAGES)), "|---" * (1 + len(STAGES)) + "|"]
    for name, both, marks in ordered:
        texts = [f"{one.r:.2f} ({one.low:.2f} to {one.high:.2f})" for one in both]
        made.append(line(f"`{name}`", [f"**{t}**" if mark else t for t, mark in zip(texts, marks, strict=True)]))
    return made


def within(table: pl.DataFrame, feature: str) -> Within:
    """The correlation of a feature with `fold` within recipes."""
    off = table.select(pl.col(feature, "fold") - pl.col(feature, "fold").mean().over("recipe")).to_numpy()
    r = float(np.corrcoef(off.T)[0, 1])
    error = (len(table) - table["recipe"].n_unique() - 2) ** -0.5
    low, high = np.tanh(np.arctanh(r) + norm.ppf([0.025, 0.975]) * error).tolist()
    return Within(r, low, high, float(2 * norm.sf(abs(np.arctanh(r)) / error)))
