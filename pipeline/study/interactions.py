"""Where the effect of one setting depends on the level of another.

The effect of a setting over its matched pairs (see effects) is taken apart by the level that another setting has in
both recipes of a pair: two halves, each with a t-interval of its own. The difference between the halves is taken from
quadruples, recipes that differ in these two settings alone, so that a third setting cannot make it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.study.intervals import Array, Summary, holm, summary
from pipeline.study.lines import Lines
from pipeline.study.matching import BOTH, OUTCOMES, Design, columns_beside, design, neighbours, with_beside
from pipeline.tables import pick

SCHEMA = {
    "setting": pl.String,
    "low": pl.String,
    "high": pl.String,
    "other": pl.String,
    "other_low": pl.String,
    "other_high": pl.String,
    "effect_low": pl.Float64,
    "half_low": pl.Float64,
    "n_low": pl.Int64,
    "effect_high": pl.Float64,
    "half_high": pl.Float64,
    "n_high": pl.Int64,
    "difference": pl.Float64,
    "half": pl.Float64,
    "n": pl.Int64,
    "p": pl.Float64,
    "p_holm": pl.Float64,
    "flips": pl.Boolean,
    "p_flip": pl.Float64,
    **{f"{name}_{part}": pl.Float64 for name in ("base", *BOTH) for part in ("low", "half_low", "high", "half_high")},
}


@dataclass(frozen=True)
class Split:
    """The effect of a setting's step (low, high) at two levels of another setting; places in a Design's tuples.

    at_low, at_high: effects where the other setting has its lower and its higher level; difference: of quadruples
    """

    setting: int
    low: int
    high: int
    other: int
    other_low: int
    other_high: int
    at_low: Summary
    at_high: Summary
    difference: Summary

    @property
    def flips(self) -> Array:
        """(V,) bool: the signs differ, and both intervals exclude 0."""
        sure = (abs(self.at_low.mean) > self.at_low.half) & (abs(self.at_high.mean) > self.at_high.half)
        return sure & (self.at_low.mean * self.at_high.mean < 0)

    @property
    def p_flip(self) -> Array:
        """(V,): p of "the signs do not differ". An intersection-union test, so the larger of both halves' p is valid
        without any correction (Berger, Technometrics 24 (1982)); 1 where the signs agree.
        """
        p = np.maximum(self.at_low.p, self.at_high.p)
        return np.where(np.isnan(p) | (self.at_low.mean * self.at_high.mean < 0), p, 1.0)


def splits(found: Design) -> Iterator[Split]:
    """All pairs of settings and their steps, where both halves have two pairs at least."""
    for setting in range(len(found.settings)):
        for low, high in found.steps(setting):
            lows, highs = found.matched(setting, low, high)
            if not len(lows):
                continue
            differences = found.values[highs] - found.values[lows]
            for other in (o for o in range(len(found.settings)) if o != setting):
                key, code = found.key(setting, other)[lows], found.codes[lows, other]
                for at in neighbours(np.unique(found.codes[:, other]).tolist()):
                    halves = [np.flatnonzero(code == level) for level in at]
                    if min(map(len, halves)) >= 2:
                        effects = [summary(differences[half]) for half in halves]
                        _, i, j = np.intersect1d(*(key[half] for half in halves), True, return_indices=True)
                        quadruples = differences[halves[1][j]] - differences[halves[0][i]]
                        yield Split(setting, low, high, other, *at, *effects, summary(quadruples))


def interactions(found: Lines, stage: str, ratio: float | None, outcome: str = "fold") -> pl.DataFrame:
    """One line per step of a setting and step of another setting: how the one's effect depends on the other.

    effect_low, half_low, n_low: the effect of setting from low to high, in points, half of its 95% t-interval, and the
    pairs, where `other` has the level other_low; effect_high, ...: at other_high. difference: effect_high less
    effect_low, over n quadruples of recipes that differ in the two settings alone (so it need not be the difference of
    the two columns where recipes are missing); half, p: of the difference; null below two quadruples. p_holm: p of the
    difference, corrected (Holm) for all differences of the table, each counted once although it stands in two lines
    (of A over B, and of B over A). flips: the signs of the halves differ, and both intervals exclude 0. p_flip: the
    larger p of the halves where the signs differ (intersection-union), else 1, corrected (Holm) over the table.

    Beside the halves, over the same pairs: base_low, base_half_low, base_high, base_half_high, the effects on the
    uncompressed networks, and raw_low, ..., repaired_low, ... those on this outcome in these stages.

    Intervals are over recipes as those of `effects` are.
    """
    table, names = with_beside(found, stage, ratio)
    made = design(table, found.settings, names)
    return as_table(made, list(splits(made)), names, pick("outcome", {name: name for name in OUTCOMES}, outcome))


def as_table(made: Design, found: list[Split], names: tuple[str, ...], outcome: str) -> pl.DataFrame:
    """The splits as the lines of `interactions`. names: of the columns of values."""
    column = names.index(outcome)
    beside = {name: names.index(of) for name, of in columns_beside(outcome).items() if name in ("base", *BOTH)}
    corrected = {"p_holm": _differences(found, column), "p_flip": flip_p(found, column)}
    lines = [_line(made, split, column, beside) for split in found]
    table = pl.DataFrame(lines, schema={name: dtype for name, dtype in SCHEMA.items() if name not in corrected})
    table = table.with_columns(**{name: pl.Series(values, dtype=pl.Float64) for name, values in corrected.items()})
    return table.select(list(SCHEMA)).fill_nan(None)


def _line(made: Design, split: Split, column: int, beside: dict[str, int]) -> dict[str, object]:
    line = {
        "setting": made.settings[split.setting],
        "low": made.levels[split.setting][split.low],
        "high": made.levels[split.setting][split.high],
        "other": made.settings[split.other],
        "other_low": made.levels[split.other][split.other_low],
        "other_high": made.levels[split.other][split.other_high],
        "difference": split.difference.mean[column],
        "half": split.difference.half[column],
        "n": int(split.difference.n[column]),
        "p": split.difference.p[column],
        "flips": bool(split.flips[column]),
    }
    for at, half in {"low": split.at_low, "high": split.at_high}.items():
        line |= {f"effect_{at}": half.mean[column], f"half_{at}": half.half[column], f"n_{at}": int(half.n[column])}
        for name, place in beside.items():
            line |= {f"{name}_{at}": half.mean[place], f"{name}_half_{at}": half.half[place]}
    return line


def flip_p(found: list[Split], column: int) -> Array:
    """(m,) p_flip of each split, corrected."""
    return holm(np.array([split.p_flip[column] for split in found]))


def _differences(found: list[Split], column: int) -> Array:
    """(m,) p of each difference, corrected. The same quadruples, read the other way round, are one test."""
    p: dict[tuple[tuple[int, int, int], ...], float] = {}
    sides = [tuple(sorted([(s.setting, s.low, s.high), (s.other, s.other_low, s.other_high)])) for s in found]
    for test, split in zip(sides, found, strict=True):
        p[test] = split.difference.p[column]
    corrected = dict(zip(p, holm(np.array(list(p.values()))), strict=True))
    return np.array([corrected[test] for test in sides])
