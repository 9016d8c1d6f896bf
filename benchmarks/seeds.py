"""Noise over seeds, two factorials and predictions, on networks of our own: docs/own_study.md.

    python -m scripts.train sweep=seeds_sam_l1_cifar10 data.root=cifar10.npz paths.runs=runs/seeds
    python -m scripts.train sweep=seeds_sam_l1_cifar10 data.root=cifar10.npz paths.runs=runs/seeds \\
        seed=4,5,6,7 optim.sam.rho=0.0 optim.l1=0.0
    python -m scripts.train sweep=seeds_adam_cifar10 data.root=cifar10.npz paths.runs=runs/seeds
    python -m scripts.features runs/seeds
    python -m scripts.report runs/seeds --out benchmarks/results/seeds.parquet
    python -m benchmarks.seeds
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.special import stdtrit

from benchmarks import foretell
from benchmarks.common import line, write_below
from pipeline.study.lines import Lines, lines
from pipeline.study.noise import noise
from pipeline.study.sweep import Sweep, load
from pipeline.tables import UserError

RESULTS = Path("benchmarks/results/seeds.parquet")
PAGE = Path("docs/own_study.md")
MARK = "<!-- written by python -m benchmarks.seeds from here on -->"
HALF = 0.5
STAGES = ("raw", "repaired")
OUTCOMES = {"base": "dense", "fold": "fold", "prune": "best pruning", "gap": "gap"}  # column of Lines: its name here
FEWEST = 8  # seeds of a recipe whose noise is said by itself


@dataclass(frozen=True)
class Factor:
    """A setting at two levels. column: of Lines.table."""

    name: str
    column: str
    low: float
    high: float


@dataclass(frozen=True)
class Factorial:
    """Two factors crossed under one optimizer. half: the ratio that its page shows first."""

    title: str
    optimizer: str
    first: Factor
    second: Factor


FACTORIALS = (
    Factorial("SAM and L1 under SGD", "sgd", Factor("SAM", "rho", 0.0, 0.1), Factor("L1", "l1", 0.0, 1e-4)),
    Factorial(
        "Weight decay and learning rate under Adam",
        "adam",
        Factor("decay", "weight_decay", 0.0, 5e-4),
        Factor("learning rate", "lr", 1e-3, 1e-2),
    ),
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        found = load(RESULTS)
        parts = [noise_part(found), *(part(found, factorial) for factorial in FACTORIALS), foretell.part(found)]
    except UserError as error:
        sys.exit(f"error: {error}")
    write_below(PAGE, MARK, "Our own networks, with seeds", "\n\n".join("\n".join(p) for p in parts).split("\n"))


def table_of(sweep: Sweep, optimizer: str) -> pl.DataFrame:
    """Lines of the cells of one optimizer, in points: one for each cell, stage and ratio."""
    return lines(sweep.where([f"optim.name={optimizer}"])).table


# --- noise


def noise_part(sweep: Sweep) -> list[str]:
    """Spread over the seeds of every recipe that has FEWEST, and noise over all recipes at half of the channels."""
    every = lines(sweep)
    said = []
    for (recipe,), of_recipe in every.table.partition_by("recipe", as_dict=True, maintain_order=True).items():
        if of_recipe["seed"].n_unique() >= FEWEST:
            said += ["", f"{recipe}: mean ± standard deviation of {of_recipe['seed'].n_unique()} seeds.", ""]
            said += spread_table(of_recipe)
    return ["## Noise over seeds", *said, "", POOLED, "", *noise_table(every)]


POOLED = (
    "Over all recipes at half of the channels (`pipeline.study.noise`): deviation, the standard deviation within a "
    "recipe, pooled; reliability, the share of the variance over networks that is between recipes (ICC(1), with a 95% "
    "interval from the F distribution); pairs, matched pairs of networks for a 95% interval of ± 1 point."
)


def spread_table(of_recipe: pl.DataFrame) -> list[str]:
    ratios = sorted(of_recipe["ratio"].drop_nulls().unique())
    made = [line("ratio removed", [*(f"{stage} {r:g}" for stage in STAGES for r in ratios)])]
    made.append("|---" * (1 + len(STAGES) * len(ratios)) + "|")
    for column, name in OUTCOMES.items():
        here = [at(of_recipe, stage, ratio)[column] for stage in STAGES for ratio in ratios]
        made.append(line(name, [*(f"{values.mean():.1f} ± {values.std():.1f}" for values in here)]))
    return made


def noise_table(every: Lines) -> list[str]:
    columns = [f"{stage}: {what}" for stage in STAGES for what in ("deviation", "reliability", "pairs")]
    made = [line("at .5", columns), "|---" * (1 + len(columns)) + "|"]
    by_stage = [noise(every, stage, HALF) or {} for stage in STAGES]
    for column in by_stage[0]:
        cells = []
        for found in by_stage:
            one = found[column]
            share = "-" if one.reliability is None else f"{one.reliability:.2f}"
            share += "" if one.low is None else f" ({one.low:.2f} to {one.high:.2f})"
            cells += [f"{one.sd:.2f}", share, str(one.needed)]
        made.append(line(OUTCOMES[column], cells))
    return [*made, "", f"{every.recipes} recipes, {len(every.at(STAGES[0], HALF))} networks."]


# --- factorials


def part(sweep: Sweep, factorial: Factorial) -> list[str]:
    """Means of the four recipes, and every contrast over the seeds that all four have."""
    table = table_of(sweep, factorial.optimizer)
    a, b = factorial.first, factorial.second
    made = [f"## {factorial.title}", "", f"{a.name}: {a.low:g} to {a.high:g}; {b.name}: {b.low:g} to {b.high:g}.", ""]
    made += [*means_table(table, factorial)]
    for stage in STAGES:
        n = len(complete(at(table, stage, HALF), factorial))
        made += ["", f"Effects in points, {stage} (± half of a 95% interval, {n} seeds as blocks):", ""]
        made += contrast_table(table, factorial, stage)
    return made


def means_table(table: pl.DataFrame, factorial: Factorial) -> list[str]:
    a, b = factorial.first, factorial.second
    half = [at(table, stage, HALF) for stage in STAGES]
    names = [f"{stage} {name}" for stage in STAGES for column, name in OUTCOMES.items() if column != "base"]
    made = [line(a.name, [b.name, "n", "dense", *names]), "|---" * (4 + len(names)) + "|"]
    for low_or_high in ((a.low, b.low), (a.low, b.high), (a.high, b.low), (a.high, b.high)):
        here = [recipe_of(of_stage, factorial, low_or_high) for of_stage in half]
        values = [of[column].mean() for of in here for column in OUTCOMES if column != "base"]
        cells = [*(f"{level:g}" for level in low_or_high), str(len(here[0])), f"{here[0]['base'].mean():.1f}"]
        made.append(line(cells[0], [*cells[1:], *(f"{value:.1f}" for value in values)]))
    return made


def contrast_table(table: pl.DataFrame, factorial: Factorial, stage: str) -> list[str]:
    """One line for each contrast and ratio."""
    shown = list(OUTCOMES)
    made = [line("effect", ["ratio", *(OUTCOMES[name] for name in shown)]), "|---" * (2 + len(shown)) + "|"]
    ratios = sorted(table["ratio"].drop_nulls().unique())
    for name, signs in contrasts(factorial).items():
        for ratio in ratios:
            found = [effect(at(table, stage, ratio), factorial, signs, column) for column in shown]
            made.append(line(name, [f"{ratio:g}", *(f"{value:+.1f} ± {half:.1f}" for value, half in found)]))
    return made


# A recipe of a factorial: is the first factor high, is the second.
RECIPES = ((False, False), (False, True), (True, False), (True, True))
Signs = Mapping[tuple[bool, bool], float]


def contrasts(factorial: Factorial) -> dict[str, Signs]:
    """{name: weight of each of RECIPES; 0 where it is left out}"""
    a, b = factorial.first, factorial.second
    return {
        f"{a.name}, {b.name} {b.low:g}": {(True, False): 1, (False, False): -1},
        f"{a.name}, {b.name} {b.high:g}": {(True, True): 1, (False, True): -1},
        f"{b.name}, {a.name} {a.low:g}": {(False, True): 1, (False, False): -1},
        f"{b.name}, {a.name} {a.high:g}": {(True, True): 1, (True, False): -1},
        "their interaction": {(True, True): 1, (False, False): 1, (True, False): -1, (False, True): -1},
    }


def effect(of_stage: pl.DataFrame, factorial: Factorial, signs: Signs, column: str) -> tuple[float, float]:
    """(contrast of the recipes' means, half of its 95% interval), over the seeds that have all four recipes."""
    found = [[cells[recipe][column] for recipe in RECIPES] for cells in complete(of_stage, factorial)]
    return contrast(np.array(found), np.array([signs.get(recipe, 0) for recipe in RECIPES]))


def contrast(found: np.ndarray, signs: np.ndarray) -> tuple[float, float]:
    """(value, half of its 95% t-interval) of a contrast in randomised blocks.

    found: (seeds, recipes). signs: (recipes,), the weights of the contrast.
    Seeds are blocks, because networks of one seed share pictures, first weights and the order of batches. The error is
    what neither seed nor recipe explains, with (seeds - 1) (recipes - 1) degrees of freedom; it is taken to be the same
    in all recipes (Montgomery, Design and Analysis of Experiments, section 4.1).
    """
    rest = found - found.mean(0) - found.mean(1, keepdims=True) + found.mean()
    freedom = (found.shape[0] - 1) * (found.shape[1] - 1)
    error = (rest**2).sum() / freedom * (signs**2).sum() / len(found)
    return float(found.mean(0) @ signs), float(stdtrit(freedom, 0.975) * error**0.5)


def complete(of_stage: pl.DataFrame, factorial: Factorial) -> list[dict[tuple[bool, bool], dict]]:
    """{recipe: its line} of every seed that has all four recipes. UserError for fewer than two such seeds."""
    found = list(by_recipe(of_stage, factorial))
    whole = [cells for cells in found if len(cells) == 4]
    if len(whole) < 2:
        raise UserError(
            f"{factorial.title}: {len(whole)} seeds have all four recipes; two are needed, run the sweep on"
        )
    return whole


def by_recipe(of_stage: pl.DataFrame, factorial: Factorial) -> Iterator[dict[tuple[bool, bool], dict]]:
    a, b = factorial.first, factorial.second
    for of_seed in of_stage.partition_by("seed", maintain_order=True):
        yield {(line[a.column] == a.high, line[b.column] == b.high): line for line in of_seed.to_dicts()}


def recipe_of(of_stage: pl.DataFrame, factorial: Factorial, levels: tuple[float, float]) -> pl.DataFrame:
    columns = (factorial.first.column, factorial.second.column)
    return of_stage.filter(*(pl.col(column) == level for column, level in zip(columns, levels, strict=True)))


def at(table: pl.DataFrame, stage: str, ratio: float) -> pl.DataFrame:
    return table.filter(pl.col("stage") == stage, (pl.col("ratio") - ratio).abs() < 1e-9)


if __name__ == "__main__":
    main()
