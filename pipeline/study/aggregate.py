"""Methods over many networks, with the uncertainty that comes from having these networks and no others.

After Agarwal et al., Deep reinforcement learning at the edge of the statistical precipice (arXiv:2108.13264), whose
tasks are our networks: the interquartile mean in place of the mean, which one broken network moves, and of the median,
which ignores half of the networks; performance profiles; the probability that one method beats another. A bootstrap
draws whole recipes with all their seeds (clusters), because seeds of one recipe are not independent networks.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import polars as pl

from pipeline.study.intervals import Array
from pipeline.study.lines import Lines

DRAWS = 1000  # of the bootstrap
CHUNK = 100  # draws at a time, which bounds the memory: cells x CHUNK numbers
THRESHOLDS = 51  # points of a profile
FOLDS = ("fold", "mix")  # kinds of methods that fold


def interquartile_mean(found: Lines, stage: str, ratio: float | None) -> pl.DataFrame:
    """One line per method: kind, value (the mean of the middle half of its networks, in points), low, high (95%
    interval, bootstrap over recipes; null for one recipe), n networks, recipes.

    A method has the networks that it was measured on; compare n before comparing methods.
    """
    lines = []
    for (method, kind), own in _methods(found, stage, ratio):
        own = own.sort("value")
        values = own["value"].to_numpy()

        def mean(weights: Array, values: Array = values) -> Array:
            return middle_mean(values, weights)

        lines.append({"method": method, "kind": kind, **_bootstrapped(own, mean)})
    return pl.DataFrame(lines, schema={"method": pl.String, "kind": pl.String, **INTERVAL})


def middle_mean(values: Array, weights: Array) -> Array:
    """The interquartile mean: values (n,) in rising order, weights (..., n) how often each occurs -> (...).

    Values that a quartile cuts count by the part inside, so that no n needs rounding.
    """
    ends = weights.cumsum(-1)
    quarter = ends[..., -1:] / 4
    inside = np.clip(ends, quarter, 3 * quarter) - np.clip(ends - weights, quarter, 3 * quarter)
    return inside @ values / inside.sum(-1)


def profiles(found: Lines, stage: str, ratio: float | None) -> pl.DataFrame:
    """Performance profiles: one line per method and loss: share of its networks that lose at most so much, low, high.

    loss: points by which the network is worse than itself uncompressed, from the smallest to the largest of all
    methods; low, high: pointwise 95% interval (bootstrap over recipes; null for one recipe); n networks, recipes.
    """
    parts = list(_methods(found, stage, ratio))
    losses = np.concatenate([own["loss"].to_numpy() for _, own in parts]) if parts else np.zeros(0)
    grid = np.linspace(losses.min(), losses.max(), THRESHOLDS) if len(losses) else losses
    tables = [pl.DataFrame(schema={"method": pl.String, "kind": pl.String, "loss": pl.Float64, **SHARE})]
    for (method, kind), own in parts:
        reached = (own["loss"].to_numpy()[:, None] <= grid).astype(np.float64)

        def share(weights: Array, reached: Array = reached) -> Array:
            return weights @ reached / weights.sum(-1, keepdims=True)

        told = {name: pl.lit(text, pl.String) for name, text in (("method", method), ("kind", kind))}
        line = pl.DataFrame({"loss": grid, **_bootstrapped(own, share, "share")}, schema_overrides=SHARE)
        tables.append(line.select(**told, **{name: name for name in ("loss", *SHARE)}))
    return pl.concat(tables)


def improvement(found: Lines, stage: str, ratio: float | None) -> pl.DataFrame:
    """One line per method that folds and `other` that prunes: probability that it leaves more of a network, ties half.

    low, high: 95% interval (bootstrap over recipes; null for one recipe); n networks that both were measured on, and
    recipes. Both methods meet on the same network, so this is a paired comparison, unlike that of arXiv:2108.13264.
    """
    parts = list(_methods(found, stage, ratio))
    folds = [(name, own) for (name, kind), own in parts if kind in FOLDS]
    prunes = [(name, own) for (name, kind), own in parts if kind == "prune"]
    lines = []
    for (method, own), (other, theirs) in product(folds, prunes):
        both = own.join(theirs.select("cell", other="loss"), on="cell", maintain_order="left")
        if len(both):
            wins = (np.sign((both["other"] - both["loss"]).to_numpy()) + 1) / 2

            def probability(weights: Array, wins: Array = wins) -> Array:
                return weights @ wins / weights.sum(-1)

            lines.append({"method": method, "other": other, **_bootstrapped(both, probability, "probability")})
    return pl.DataFrame(lines, schema={"method": pl.String, "other": pl.String, **_named("probability")})


def _named(name: str) -> dict[str, pl.DataType]:
    numbers = {column: pl.Float64 for column in (name, "low", "high")}
    return {**numbers, "n": pl.Int64, "recipes": pl.Int64}


INTERVAL, SHARE = _named("value"), _named("share")


def _methods(found: Lines, stage: str, ratio: float | None) -> list[tuple[tuple[str, str], pl.DataFrame]]:
    """((method, kind), its networks: cell, recipe, value, loss) at one ratio, or over the area where ratio is None."""
    lines = found.methods.filter(pl.col("stage") == stage).select("cell", "recipe", "method", "kind", "ratio", "value")
    base = found.table.select("cell", "base").drop_nulls().unique("cell")
    lines = lines.drop_nulls("value").join(base, on="cell", maintain_order="left")
    lines = _areas(lines) if ratio is None else lines.filter(pl.col("ratio") == ratio)
    lost = pl.col("base") - pl.col("value")
    lines = lines.with_columns(loss=lost if found.metric.higher_is_better else -lost)
    return list(lines.partition_by("method", "kind", as_dict=True, maintain_order=True).items())


def _areas(lines: pl.DataFrame) -> pl.DataFrame:
    """The mean of each method's curve from ratio 0, the uncompressed network, to its largest (trapezoids).

    A method that lacks one of the ratios that others have on the same network has no area there, because the area up
    to a smaller ratio would be another number.
    """
    keys = ["cell", "recipe", "method", "kind", "base"]
    full = lines.group_by("cell").agg(ratios=pl.col("ratio").n_unique())
    start = lines.select(keys).unique(maintain_order=True).with_columns(ratio=pl.lit(0.0), value="base")
    curve = pl.concat([start, lines.filter(pl.col("ratio") > 0)], how="diagonal").sort("ratio", maintain_order=True)
    heights = (pl.col("value") + pl.col("value").shift()) / 2
    area = (heights * pl.col("ratio").diff()).sum() / pl.col("ratio").max()
    areas = curve.group_by(keys, maintain_order=True).agg(value=area, ratios=pl.len() - 1)
    return areas.join(full, on=["cell", "ratios"], how="semi", maintain_order="left")


def _bootstrapped(own: pl.DataFrame, statistic: Callable[[Array], Array], name: str = "value") -> dict[str, object]:
    """{name: the statistic of these networks, low, high: quantiles over draws of their recipes, n, recipes}

    statistic: weights (..., n), how often each network occurs -> (...) or (..., T)
    """
    recipe = np.unique(own["recipe"].to_numpy(), return_inverse=True)[1]
    recipes = int(recipe.max()) + 1
    found = {name: statistic(np.ones(len(own))), "low": None, "high": None, "n": len(own), "recipes": recipes}
    if recipes > 1:
        rng = np.random.default_rng(0)
        even = np.full(recipes, 1 / recipes)
        draws = [statistic(rng.multinomial(recipes, even, CHUNK)[:, recipe]) for _ in range(DRAWS // CHUNK)]
        found["low"], found["high"] = np.quantile(np.concatenate(draws), [0.025, 0.975], axis=0)
    return found
