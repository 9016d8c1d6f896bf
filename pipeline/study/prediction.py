"""How well foldability is foretold before anything is compressed, on networks that the model never saw.

Networks are held out in groups, so that a score says what it seems to say: by recipe (seeds of one recipe never stand
on both sides), and by level (all networks of one level of a setting at once, which asks a model to reach beyond what
was trained). The mean, the uncompressed network's accuracy alone and "always fold" stand beside every model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from pipeline.study.intervals import Array
from pipeline.study.lines import Lines
from pipeline.study.noise import noise
from pipeline.tables import UserError, optional

TARGETS = ("fold", "gap")  # headline first
FOLDS = 10  # at most; as many as there are groups where these are fewer
TREES = 100  # of a forest
DRAWS = 1000  # of the bootstrap
MODELS = ("ridge", "forest")
FEWEST = 20  # recipes; below, a tenth of them is one or two
MEAN, BASE, ALWAYS = "mean", "base", "always fold"  # what every model stands beside
RECIPE = "recipe"
SCHEMA = {
    "target": pl.String,
    "held_out": pl.String,
    "features": pl.String,
    "model": pl.String,
    "r2": pl.Float64,
    "r2_low": pl.Float64,
    "r2_high": pl.Float64,
    "mae": pl.Float64,
    "mae_low": pl.Float64,
    "mae_high": pl.Float64,
    "spearman": pl.Float64,
    "regret": pl.Float64,
    "ceiling": pl.Float64,
    "n": pl.Int64,
    "recipes": pl.Int64,
    "folds": pl.Int64,
}


@dataclass(frozen=True)
class Task:
    """What is foretold of which networks.

    y: (n,) target, in points; groups: (n,) of what is held out together; recipes: (n,) int64 from 0
    """

    target: str
    held_out: str
    y: Array
    groups: Array
    recipes: Array

    @property
    def folds(self) -> int:
        return min(FOLDS, len(np.unique(self.groups)))


@dataclass(frozen=True)
class Asked:
    """What is tried. models: of MODELS; levels: hold out the levels of settings, too; fewest: recipes, below which
    prediction is refused; trees: of a forest, None: TREES."""

    models: tuple[str, ...] = MODELS
    levels: bool = True
    fewest: int = FEWEST
    trees: int | None = None


class Foretold(NamedTuple):
    """A line of `predictions`, and what was said of each network, (n,) in points; None for "always fold"."""

    line: dict[str, Any]
    said: Array | None


@dataclass(frozen=True)
class Prediction:
    """cells: the networks, in the order of `said`: cell, recipe, fold, gap, base and their features; lines: see
    `predictions`."""

    cells: pl.DataFrame
    lines: list[Foretold]

    @property
    def table(self) -> pl.DataFrame:
        return pl.DataFrame([one.line for one in self.lines], schema=SCHEMA)


def predictions(
    found: Lines, stage: str, ratio: float | None, extra: pl.DataFrame | None = None, asked: Asked = Asked()
) -> pl.DataFrame:
    """One line per target, held-out group, features and model: how close the foretold values come, in points.

    target: fold (what folding leaves) or gap. held_out: "recipe", or a setting whose levels are left out one by one.
    features: none, base, settings, settings + base, and with `extra` (a column cell and numeric columns, such as
        statistics of the weights) also extra and settings + base + extra. Networks that lack one are left out of all.
    model: mean (of the others; it has no spearman), ridge (squares and products of all features where the networks are
        more than these, else the features alone; its strength is chosen within the rest) or forest; and for the gap
        "always fold", which foretells nothing but the choice.
    r2: share of the variance foretold, 1 - sum of squares / sum of squares around the mean, over all held-out values
        together; it is below 0 where a model is worse than the mean. mae: mean absolute error; spearman: rank
        correlation. r2_low, ..., mae_high: 95% intervals (see `intervals`).
    regret: for the gap, how many points below the better side a choice by the foretold sign stays, mean over networks.
    ceiling: the r2 that recipes can reach at most, because seeds of one recipe differ (noise.reliability); null where
        no recipe has two seeds. Features of a network may tell more than its recipe, and so pass the ceiling.

    UserError for fewer than asked.fewest recipes, for features without a network, or where scikit-learn is missing.
    """
    return prediction(found, stage, ratio, extra, asked).table


def prediction(
    found: Lines, stage: str, ratio: float | None, extra: pl.DataFrame | None = None, asked: Asked = Asked()
) -> Prediction:
    """`predictions`, with what was said of each network."""
    optional("prediction", "sklearn", "study")
    table = found.at(stage, ratio).drop_nulls([*TARGETS, "base"])
    more = [] if extra is None else [name for name in extra.columns if name != "cell"]
    if extra is not None:
        table = table.join(extra, on="cell", how="inner", maintain_order="left", suffix=" (feature)")
        more = [name if name not in found.table.columns else f"{name} (feature)" for name in more]
        table = table.drop_nulls(more)
    if (recipes := table["recipe"].n_unique()) < asked.fewest:
        lacking = asked.fewest - recipes
        raise UserError(
            f"{recipes} recipes have all features; prediction needs {asked.fewest}: measure {lacking} more"
            f"{', or drop `extra`' if more else ''}"
        )
    heard = noise(found, stage, ratio) or {}
    matrices = features(table, found.settings, more)
    lines = []
    for target in TARGETS:
        ceiling = heard[target].reliability if target in heard else None
        for task in tasks(table, target, found.settings if asked.levels else ()):
            about = {"ceiling": ceiling, "recipes": recipes}
            lines += [Foretold(line | about, said) for line, said in _lines(task, matrices, asked)]
    return Prediction(table, lines)


def tasks(table: pl.DataFrame, target: str, settings: tuple[str, ...]) -> Iterator[Task]:
    """The recipes held out by tenths, then the levels of each setting that has several."""
    y = table[target].to_numpy()
    recipes = (table[RECIPE].rank("dense") - 1).cast(pl.Int64).to_numpy()
    for name in (RECIPE, *settings):
        if table[name].n_unique() > 1:
            yield Task(target, name, y, table[name].rank("dense").fill_null(0).to_numpy(), recipes)


def features(table: pl.DataFrame, settings: tuple[str, ...], more: list[str]) -> dict[str, Array]:
    """{features: (n, F) float64} of every set but none. Columns that do not vary are left out.

    A numeric setting is itself, or its logarithm where it is positive and spans a factor of ten; any other setting is a
    column for each level but the first. A setting that a network lacks is 0 with a column that says so.
    """
    columns = {name: _columns(table[name]) for name in settings}
    told = [column for several in columns.values() for column in several]
    base, beyond = [table["base"].to_numpy()], [table[name].cast(pl.Float64).to_numpy() for name in more]
    sets = {BASE: base, "settings": told, "settings + base": told + base}
    if more:
        sets |= {"extra": beyond, "settings + base + extra": told + base + beyond}
    return {name: np.stack(several, axis=1) for name, several in sets.items() if several}


def _columns(column: pl.Series) -> list[Array]:
    lacking = column.is_null().to_numpy()
    if column.dtype.is_numeric():
        values = column.cast(pl.Float64)
        low, high = values.min(), values.max()
        values = values.log(10) if low is not None and low > 0 and high >= 10 * low else values
        found = [(values - values.mean()).fill_null(0).to_numpy()]
    else:
        levels = column.drop_nulls().unique().sort()[1:]
        found = [(column == level).fill_null(False).to_numpy().astype(np.float64) for level in levels]
    return [one for one in (*found, lacking.astype(np.float64)) if np.ptp(one) > 0]


def _lines(task: Task, matrices: dict[str, Array], asked: Asked) -> Iterator[Foretold]:
    """The scores of every model on one task, and what it said."""
    about = {"target": task.target, "held_out": task.held_out, "n": len(task.y), "folds": task.folds}
    said = foretold(task, None, MEAN)
    yield Foretold(about | {"features": "none", "model": MEAN} | scores(task, said) | {"spearman": None}, said)
    if task.target == "gap":
        lost = regret(task.y, np.ones(len(task.y)))
        yield Foretold(about | {"features": "none", "model": ALWAYS, "regret": lost}, None)
    for name, x in matrices.items():
        for model in asked.models:
            said = foretold(task, x, model, asked.trees)
            yield Foretold(about | {"features": name, "model": model} | scores(task, said), said)


def foretold(task: Task, x: Array | None, model: str, trees: int | None = None) -> Array:
    """(n,) what a model says of each network when all of its group are held out. x: (n, F) features.

    A feature that the other networks share (the level that is held out was the only other one) is left out: they cannot
    tell what it does, and its rounding errors would be taken for a scale.
    """
    from sklearn.model_selection import GroupKFold

    said = np.full(len(task.y), np.nan)
    for rest, out in GroupKFold(task.folds).split(task.y, groups=task.groups):
        told = None if x is None else np.ptp(x[rest], axis=0) > 1e-9 * np.ptp(x, axis=0)
        if told is None or not told.any():
            said[out] = task.y[rest].mean()
        else:
            fresh = _ridge(len(rest), int(told.sum())) if model == "ridge" else _forest(trees or TREES)
            said[out] = fresh.fit(x[rest][:, told], task.y[rest]).predict(x[out][:, told])
    return said


def _forest(trees: int) -> Any:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(trees, min_samples_leaf=2, random_state=0)


def _ridge(networks: int, columns: int) -> Any:
    """Ridge regression on all squares and products, where the networks are more than these, else on the columns."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    products = PolynomialFeatures(2 if columns * (columns + 3) / 2 < networks else 1, include_bias=False)
    return make_pipeline(StandardScaler(), products, StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))


def scores(task: Task, said: Array) -> dict[str, float | None]:
    """r2, mae and their intervals, spearman and, for the gap, regret (see `predictions`)."""
    y, varies = task.y, np.ptp(said) > 0 and np.ptp(task.y) > 0
    spread = ((y - y.mean()) ** 2).sum()
    return {
        "r2": float(1 - ((y - said) ** 2).sum() / spread) if spread > 0 else None,
        "mae": float(np.abs(y - said).mean()),
        **intervals(task, said),
        "spearman": float(spearmanr(y, said).statistic) if varies else None,
        "regret": regret(y, said) if task.target == "gap" else None,
    }


def intervals(task: Task, said: Array) -> dict[str, float | None]:
    """r2_low, r2_high, mae_low, mae_high: 95% intervals by a bootstrap of DRAWS draws of whole recipes.

    The models are not fitted anew in a draw, so that the intervals are of these models on other networks.
    """
    y, off = task.y - task.y.mean(), task.y - said  # centred, so that squares of a mean lose no digits
    of_each = np.stack([np.ones_like(y), np.abs(off), off**2, y, y**2], axis=1)
    of_recipe = np.zeros((task.recipes.max() + 1, of_each.shape[1]))
    np.add.at(of_recipe, task.recipes, of_each)
    recipes = len(of_recipe)
    drawn = np.random.default_rng(0).multinomial(recipes, np.full(recipes, 1 / recipes), DRAWS) @ of_recipe
    n, absolute, squares, total, spread = drawn.T
    spread = spread - total**2 / n
    ends = {"mae": absolute / n, "r2": 1 - squares[spread > 0] / spread[spread > 0]}
    found: dict[str, float | None] = {}
    for name, values in ends.items():
        low, high = np.quantile(values, [0.025, 0.975]).tolist() if len(values) else (None, None)
        found |= {f"{name}_low": low, f"{name}_high": high}
    return found


def regret(gap: Array, said: Array) -> float:
    """Points lost, mean over networks, by folding where `said` > 0 and pruning elsewhere, to the better of both."""
    return float(np.where(said > 0, np.maximum(-gap, 0), np.maximum(gap, 0)).mean())
