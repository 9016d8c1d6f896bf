"""How far networks of one recipe are apart, how well one tells its recipe, and the pairs that settle a point."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.study.intervals import Array, needed
from pipeline.study.lines import Lines
from pipeline.study.matching import OUTCOMES

DRAWS = 2000  # of the bootstrap
ENOUGH = 5  # recipes with several seeds; below, a bootstrap over them says nothing


@dataclass(frozen=True)
class Noise:
    """The noise of one outcome over seeds.

    sd: standard deviation over the seeds within a recipe, pooled over the recipes, in points
    recipes, cells: recipes that have several seeds, and their cells; all_recipes: also those of one seed
    reliability: ICC(1), the share of the variance over single networks that is between recipes: 1 where a second seed
        would change nothing, 0 where a network says nothing about its recipe. It may come out below 0. None where there
        is one recipe alone.
    low, high: the 95% interval of reliability, from a bootstrap over recipes; None where fewer than ENOUGH of them have
        several seeds
    needed: matched pairs of single networks whose t-interval would have a half of one point if seeds were all that
        their differences scatter by; None where the networks cannot be told apart
    """

    sd: float
    recipes: int
    cells: int
    all_recipes: int
    reliability: float | None
    low: float | None
    high: float | None
    needed: int | None


def noise(found: Lines, stage: str, ratio: float | None) -> dict[str, Noise] | None:
    """{outcome: Noise} for those of OUTCOMES that two seeds of a recipe have; None where no recipe has two seeds."""
    table = found.at(stage, ratio)
    measured = {outcome: table.drop_nulls(outcome) for outcome in OUTCOMES}
    heard = {outcome: _noise(lines, outcome) for outcome, lines in measured.items()}
    return {outcome: one for outcome, one in heard.items() if one is not None} or None


def _noise(table: pl.DataFrame, outcome: str) -> Noise | None:
    value = pl.col(outcome)
    recipes = table.group_by("recipe").agg(n=pl.len(), mean=value.mean(), squares=((value - value.mean()) ** 2).sum())
    n, mean, squares = recipes.sort("recipe").select(pl.col("n", "mean", "squares").cast(pl.Float64)).to_numpy().T
    several = n > 1
    if not several.any():
        return None
    sd = float(np.sqrt(squares.sum() / (n - 1).sum()))
    share = float(reliability(n, mean, squares)) if len(n) > 1 else None
    low, high = _interval(n, mean, squares) if several.sum() >= ENOUGH else (None, None)
    pairs = needed(sd * 2**0.5)  # a difference has the noise of two networks
    return Noise(sd, int(several.sum()), int(n[several].sum()), len(n), share, low, high, pairs)


def reliability(n: Array, mean: Array, squares: Array) -> Array:
    """ICC(1) of recipes along the last axis: n networks each, their mean, and their sum of squares around it.

    (MSB - MSW) / (MSB + (n0 - 1) MSW) with n0 = (N - sum n^2 / N) / (k - 1): one-way analysis of variance (Shrout and
    Fleiss, Psychological Bulletin 86 (1979), ICC(1, 1); unequal n: Donner, International Statistical Review 54 (1986)).
    """
    k, total = n.shape[-1], n.sum(-1)
    grand = (n * mean).sum(-1) / total
    between = (n * (mean - grand[..., None]) ** 2).sum(-1) / (k - 1)
    within = squares.sum(-1) / (total - k)
    size = (total - (n**2).sum(-1) / total) / (k - 1)
    return (between - within) / (between + (size - 1) * within)


def _interval(n: Array, mean: Array, squares: Array) -> tuple[float, float]:
    """The 95% interval of `reliability`: quantiles over DRAWS of as many recipes, with replacement.

    Recipes of several seeds and of one are drawn apart, so that every draw has both kinds.
    """
    rng = np.random.default_rng(0)
    several, single = np.flatnonzero(n > 1), np.flatnonzero(n == 1)
    drawn = np.concatenate([rng.choice(group, (DRAWS, len(group))) for group in (several, single) if len(group)], 1)
    shares = reliability(n[drawn], mean[drawn], squares[drawn])
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)
