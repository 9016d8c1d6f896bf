"""What a setting does to foldability: matched pairs, a t-interval over recipes, Holm over the family.

A matched pair is two recipes that differ in one setting alone, so whatever else acts on both cancels. Seeds of a recipe
are averaged first: they repeat a recipe and are no recipes of their own, so n counts pairs of recipes.

**What an interval is over.** Within one line the pairs are disjoint: no recipe is in two of them. The t-interval takes
their differences as independent draws from the recipes that such a sweep could have held, and covers the mean effect
over recipes like these. In a fully crossed grid the other settings are chosen and not drawn: their interactions with
the setting widen the spread of the differences, so that for the mean over exactly these recipes the interval is wider
than it need be. Halves stand in a line of their own because of what the data show, which costs a little: on made
sweeps (benchmarks/honesty.py) the intervals of all lines cover in 94% of the draws. An interval says nothing about
levels that were not tried, and, where all cells share one seed, nothing about other seeds of the data's split. `check`
is the second opinion: one linear model of all settings and their pairwise interactions, with robust errors.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
from scipy.linalg import qr

from pipeline.study.interactions import Split, flip_p, splits
from pipeline.study.intervals import SHOWN, Array, holm, needed, summary
from pipeline.study.lines import Lines
from pipeline.study.matching import BOTH, OUTCOMES, Design, columns_beside, design, with_beside
from pipeline.study.sweep import shown
from pipeline.tables import UserError, optional, pick

BESIDE = [f"{name}_{part}" for name in (*OUTCOMES, *BOTH) for part in ("effect", "half")]

SCHEMA = {
    "setting": pl.String,
    "low": pl.String,
    "high": pl.String,
    "outcome": pl.String,
    "where": pl.String,
    "effect": pl.Float64,
    "half": pl.Float64,
    "n": pl.Int64,
    "p": pl.Float64,
    "p_holm": pl.Float64,
    "sd": pl.Float64,
    "needed": pl.Int64,
    "stage": pl.String,
    "ratio": pl.Float64,
    "along": pl.String,
    "over": pl.String,
    "p_flip": pl.Float64,
    **dict.fromkeys(BESIDE, pl.Float64),
}
CHECKED = ("setting", "low", "high", "outcome", "where", "effect", "half", "n", "p")
FEWEST_SPARE = 8  # degrees of freedom below which robust errors say little
Step = tuple[int, int, int]  # a setting and two of its levels: places in a Design's tuples


def pairs(table: pl.DataFrame, setting: str, settings: Sequence[str], low: Any, high: Any) -> pl.DataFrame:
    """The matched pairs of one step, one line each, from the cells of one stage and ratio (`Lines.at`).

    recipe: the other settings ("optim=sgd, lr=0.1"); <outcome>_low, <outcome>_high: means over the seeds of each
    recipe, and <outcome>: high less low, for every outcome, in points; seeds_low, seeds_high: cells of each recipe.

    low, high: levels, as values or as their texts. Settings that always change together with `setting` change in these
    pairs, too. UserError for a setting or a level that the table does not have; no line where no recipes match.
    """
    pick("setting", dict.fromkeys(settings), setting)
    along = design(table, settings, OUTCOMES).bundle(setting)
    made = design(table, [setting, *(name for name in settings if name not in along)], OUTCOMES)
    there = made.levels[0] if setting in made.settings else (shown(table[setting][0]),)
    for level in (low, high):
        pick(f"level of {setting}", dict.fromkeys(there), shown(level))
    step = there.index(shown(low)), there.index(shown(high))
    lows, highs = made.matched(0, *step) if len(there) > 1 else ([], [])
    columns: dict[str, Any] = {"recipe": pl.Series([made.recipe(row, without=0) for row in lows], dtype=pl.String)}
    for outcome, below, above in zip(OUTCOMES, made.values[lows].T, made.values[highs].T, strict=True):
        columns |= {f"{outcome}_low": below, f"{outcome}_high": above, outcome: above - below}
    return pl.DataFrame({**columns, "seeds_low": made.seeds[lows], "seeds_high": made.seeds[highs]}).fill_nan(None)


def effects(found: Lines, stage: str, ratio: float | None, outcomes: Sequence[str] = OUTCOMES) -> pl.DataFrame:
    """One line per setting, step between two of its levels (neighbours, and the first with the last), and outcome.

    setting, low, high: texts of the levels; along: settings that change together with it in every recipe; outcome: of
    OUTCOMES; effect: its mean over the pairs, high less low, in points; half: of the 95% t-interval; n: pairs; p:
    two-sided; p_holm: corrected (Holm) over all lines of this outcome; sd: of the pairs' differences; needed: pairs
    that bring the half-interval down to one point, if the sd stays; p, sd and needed are null for a single pair, half
    below SHOWN.

    where: levels of other settings that all pairs of the line are bound to ("" where there are none). Where the effect
    changes its sign over another setting (interactions.flips) that setting is named in `over`, and in place of the mean
    there is one line for each of its levels; p_flip then says how sure the change is (see interactions).

    Beside each effect, over the same pairs: <outcome>_effect and _half of every outcome, and raw_effect, raw_half,
    repaired_effect, repaired_half of this outcome in these stages (null for base, which has no stage).
    """
    table, names = with_beside(found, stage, ratio)
    made = design(table, found.settings, names)
    across = list(splits(made))
    lines = []
    for outcome in outcomes:
        column = names.index(pick("outcome", {name: name for name in OUTCOMES}, outcome))
        own = [_line(made, names, outcome, *part) for part in _parts(made, column, _flipped(made, across, column))]
        corrected = holm(np.array([line["p"] for line in own]))
        lines += [line | {"p_holm": p} for line, p in zip(own, corrected, strict=True)]
    told = {"stage": pl.lit(stage, pl.String), "ratio": pl.lit(ratio, pl.Float64)}
    return pl.DataFrame(lines, schema=SCHEMA).with_columns(**told).fill_nan(None)


def check(found: Lines, stage: str, ratio: float | None, outcome: str = "fold") -> pl.DataFrame:
    """The lines of `effects` for one outcome beside a second opinion: model_effect, model_half, model_p.

    The model is linear, with a term for every level of every setting and for every pair of levels of two settings, on
    all recipes, also those without a partner. Seeds are averaged first: every term is the same for all seeds of a
    recipe, so this is the model of single networks with errors clustered by recipe, but with the degrees of freedom
    that the recipes have. Errors may differ between recipes (White's, with HC1's factor). A model's effect is its
    prediction at the high level less that at the low level, mean over the recipes of the matched pairs, so that a full
    balanced grid gives the matched effect again. UserError where the model has too many terms for these recipes, or
    where statsmodels is missing.
    """
    api = optional("the second opinion on effects", "statsmodels.api", "study")
    table = found.at(stage, ratio).drop_nulls(outcome)
    made = design(table, found.settings, [outcome])
    terms = two_way(made.codes)
    spare = len(terms) - terms.shape[1]
    if spare < FEWEST_SPARE:
        raise UserError(
            f"a model of two-way interactions has too many terms for {len(terms)} recipes ({spare} to spare, "
            f"{FEWEST_SPARE} needed); measure more recipes, or keep to fewer levels with --where"
        )
    fitted = api.OLS(made.values[:, 0], terms).fit(cov_type="HC1", use_t=True)
    lines = []
    for step, lows, highs, over, p in _parts(made, 0, _flipped(made, list(splits(made)), 0)):
        test = fitted.t_test((terms[highs] - terms[lows]).mean(0))
        line = _line(made, (outcome,), outcome, step, lows, highs, over, p)
        half = np.diff(test.conf_int(0.05)).item() / 2
        lines.append([*(line[name] for name in CHECKED), test.effect.item(), half, float(test.pvalue)])
    model = dict.fromkeys(("model_effect", "model_half", "model_p"), pl.Float64)
    schema = {name: SCHEMA[name] for name in CHECKED} | model
    return pl.DataFrame(lines, schema=schema, orient="row").fill_nan(None)


def two_way(codes: Array) -> Array:
    """(R, S) codes -> (R, K) float64: 1, a column for every level, and one for every pair of levels that occurs.

    Columns that others add up to are left out (QR with pivoting): a prediction does not depend on which ones are.
    """
    levels = [[codes[:, s] == level for level in np.unique(codes[:, s])] for s in range(codes.shape[1])]
    products = (a & b for one, other in combinations(levels, 2) for a in one for b in other)
    columns = [np.ones(len(codes), bool), *(level for several in levels for level in several), *products]
    terms = np.stack([column for column in columns if column.any()], axis=1).astype(np.float64)
    triangle, order = qr(terms, mode="r", pivoting=True)
    sizes = np.abs(np.diag(triangle))
    return terms[:, np.sort(order[: (sizes > sizes[0] * max(terms.shape) * np.finfo(float).eps).sum()])]


def _flipped(made: Design, across: list[Split], column: int) -> dict[Step, tuple[int, float]]:
    """{step whose effect changes its sign: (the setting over which it does so most surely, its p_flip)}"""
    found: dict[Step, tuple[int, float]] = {}
    for split, p in zip(across, flip_p(across, column), strict=True):
        step = split.setting, split.low, split.high
        if split.flips[column] and (step not in found or p < found[step][1]):
            found[step] = split.other, float(p)
    return found


def _parts(made: Design, column: int, flipped: dict[Step, tuple[int, float]]) -> Iterator[tuple[Any, ...]]:
    """(step, rows at its low level, rows at its high level, the setting that splits it, p_flip) for each line."""
    for setting in range(len(made.settings)):
        for low, high in made.steps(setting):
            step = setting, low, high
            lows, highs = made.matched(*step)
            there = ~np.isnan(made.values[highs, column] - made.values[lows, column])
            lows, highs = lows[there], highs[there]
            if not len(lows):
                continue
            if step not in flipped:
                yield step, lows, highs, None, None
                continue
            other, p = flipped[step]
            for level in np.unique(made.codes[lows, other]):
                part = made.codes[lows, other] == level
                yield step, lows[part], highs[part], other, p


def _line(
    made: Design,
    names: Sequence[str],
    outcome: str,
    step: Step,
    lows: Array,
    highs: Array,
    over: int | None,
    p_flip: float | None,
) -> dict[str, Any]:
    """One line of `effects`. names: of the columns of values."""
    setting, low, high = step
    every = summary(made.values[highs] - made.values[lows])
    halves = np.where(every.n >= SHOWN, every.half, np.nan)
    at = names.index(outcome)
    beside = {name: names.index(of) for name, of in columns_beside(outcome).items() if of in names}
    return {
        "setting": made.settings[setting],
        "along": ", ".join(made.along[made.settings[setting]]),
        "low": made.levels[setting][low],
        "high": made.levels[setting][high],
        "outcome": outcome,
        "where": bound(made.where(setting, lows, over)),
        "over": "" if over is None else made.settings[over],
        "p_flip": p_flip,
        "effect": every.mean[at],
        "half": halves[at],
        "n": int(every.n[at]),
        "p": every.p[at],
        "sd": every.sd[at],
        "needed": needed(every.sd[at]),
        **{f"{name}_effect": every.mean[column] for name, column in beside.items()},
        **{f"{name}_half": halves[column] for name, column in beside.items()},
    }


def bound(where: dict[str, tuple[str, ...]]) -> str:
    """ "optim=sgd, lr=0.01 or 0.1" """
    return ", ".join(f"{name}={' or '.join(levels)}" for name, levels in where.items())
