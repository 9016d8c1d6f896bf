"""Recipes as codes, and pairs of them that differ in one setting alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from pipeline.study.intervals import Array
from pipeline.study.lines import Lines
from pipeline.study.sweep import shown

OUTCOMES = ("fold", "base", "gap")  # headline first
BOTH = ("raw", "repaired")  # stages that stand beside each other
ABSENT = shown(None)  # the level of a recipe that has no such setting


@dataclass(frozen=True)
class Design:
    """The recipes of a sweep, R of them, seeds averaged.

    settings: S names; settings that always change together are one, by the name of one that every recipe has
    along: {setting: the others that change together with it}
    levels: for each setting the texts of its levels, numbers in order
    codes: (R, S) int64, places in `levels`; no two rows are alike
    values: (R, V) float64, means over the seeds, NaN where no seed has one
    seeds: (R,) int64, cells of each recipe
    """

    settings: tuple[str, ...]
    along: dict[str, tuple[str, ...]]
    levels: tuple[tuple[str, ...], ...]
    codes: Array
    values: Array
    seeds: Array

    @cached_property
    def keys(self) -> dict[tuple[int, ...], Array]:
        """{settings that may differ: (R,) int64, equal where all others are}, filled by `key`."""
        return {}

    def key(self, *free: int) -> Array:
        free = tuple(sorted(free))
        if free not in self.keys:
            self.keys[free] = joint(np.delete(self.codes, free, axis=1))
        return self.keys[free]

    def bundle(self, setting: str) -> set[str]:
        """The setting and those that always change together with it."""
        return next(({name, *names} for name, names in self.along.items() if setting in (name, *names)), {setting})

    def recipe(self, row: int, without: int) -> str:
        """All settings of a recipe but one: "optim=sgd, lr=0.1"."""
        told = zip(self.settings, self.levels, self.codes[row], strict=True)
        return ", ".join(f"{name}={levels[code]}" for i, (name, levels, code) in enumerate(told) if i != without)

    def matched(self, setting: int, low: int, high: int) -> tuple[Array, Array]:
        """Pairs that differ in this setting alone: (n,) rows at the one level, (n,) rows at the other."""
        key, code = self.key(setting), self.codes[:, setting]
        lows, highs = np.flatnonzero(code == low), np.flatnonzero(code == high)
        _, i, j = np.intersect1d(key[lows], key[highs], assume_unique=True, return_indices=True)
        return lows[i], highs[j]

    def steps(self, setting: int) -> list[tuple[int, int]]:
        """Levels to compare: neighbours, and the first with the last.

        A level that no recipe could have at the same other settings (no momentum, which comes with Adam alone) is
        compared with none.
        """
        key, code = self.key(setting), self.codes[:, setting]
        return neighbours(np.unique(code[np.bincount(key)[key] > 1]).tolist())

    def where(self, setting: int, rows: Array, over: int | None = None) -> dict[str, tuple[str, ...]]:
        """{another setting: its levels that these recipes are bound to}, where others occur in the sweep.

        A setting that recipes may lack is left out where all its levels occur, and where the rest of what binds these
        recipes says already that they lack it. over: a setting that is never left out.
        """
        bound = {}
        for other, levels in enumerate(self.levels):
            there = tuple(levels[code] for code in np.unique(self.codes[rows, other]))
            if other == over or (other != setting and not set(levels) - {ABSENT} <= set(there)):
                bound[other] = there
        said = {other: there for other, there in bound.items() if there != (ABSENT,)}
        alike = np.ones(len(self.codes), bool)
        for other in said:
            alike &= np.isin(self.codes[:, other], self.codes[rows, other])
        lacking = {other for other in bound if other not in {over, *said} and self._all_lack(other, alike)}
        return {self.settings[other]: there for other, there in bound.items() if other not in lacking}

    def _all_lack(self, setting: int, recipes: Array) -> bool:
        return bool((self.codes[recipes, setting] == self.levels[setting].index(ABSENT)).all())


def design(table: pl.DataFrame, settings: Sequence[str], values: Sequence[str]) -> Design:
    """The recipes of a table of cells. values: the columns to average over the seeds of a recipe."""
    coded = {name: coded_levels(table[name]) for name in settings}
    kept, along = together({name: found for name, found in coded.items() if len(found[1]) > 1})
    codes = np.stack([coded[name][0] for name in kept], axis=1) if kept else np.zeros((len(table), 0), np.int64)
    recipe = joint(codes)
    _, first, seeds = np.unique(recipe, return_index=True, return_counts=True)
    numbers = table.select(pl.col(values).cast(pl.Float64).fill_null(np.nan)).to_numpy()
    there = ~np.isnan(numbers)
    sums, counts = np.zeros((2, len(first), len(values)))
    np.add.at(sums, recipe, np.where(there, numbers, 0))
    np.add.at(counts, recipe, there)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return Design(tuple(kept), along, tuple(coded[name][1] for name in kept), codes[first], means, seeds)


def with_beside(found: Lines, stage: str, ratio: float | None) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """(the cells of one stage, the columns of values): OUTCOMES, and "raw fold", "raw gap", ... for each of BOTH."""
    table = found.at(stage, ratio)
    staged = [outcome for outcome in OUTCOMES if outcome != "base"]  # base has no stage
    for other in BOTH:
        values = found.at(other, ratio).select("cell", *(pl.col(name).alias(f"{other} {name}") for name in staged))
        table = table.join(values, on="cell", how="left", maintain_order="left")
    return table, (*OUTCOMES, *(f"{other} {name}" for other in BOTH for name in staged))


def columns_beside(outcome: str) -> dict[str, str]:
    """{short name: column of `with_beside`} of all that stands beside an effect on this outcome."""
    staged = {} if outcome == "base" else {stage: f"{stage} {outcome}" for stage in BOTH}
    return {name: name for name in OUTCOMES} | staged


def coded_levels(column: pl.Series) -> tuple[Array, tuple[str, ...]]:
    """(places (n,) int64, the texts of the levels): absent first, numbers in order, short lists before long ones."""
    texts = {value: shown(value) for value in sorted(column.unique(), key=_order)}
    places = {text: place for place, text in enumerate(dict.fromkeys(texts.values()))}
    return np.array([places[texts[value]] for value in column], np.int64), tuple(places)


def _order(value: Any) -> tuple[int, float, str]:
    """Sorts the values of one column."""
    if value is None:
        return 0, 0, ""
    if isinstance(value, (int, float)):
        return 1, value, ""
    text = str(value)
    return 2, text.count(",") if text.startswith("[") else 0, text


def together(coded: dict[str, tuple[Array, tuple[str, ...]]]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Settings, of which those that split the cells in the same way are one: the names kept, and what goes along.

    Settings that have another level in every recipe stay apart: in a random search each would go along with each.
    """
    recipes = len(np.unique(joint(np.stack([codes for codes, _ in coded.values()], axis=1)))) if coded else 0
    groups: dict[bytes, list[str]] = {}
    for name, (codes, levels) in coded.items():
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        split = first[inverse].tobytes()  # of each cell the first that has its level
        groups.setdefault(split if len(levels) < recipes else name.encode(), []).append(name)
    ordered = [sorted(names, key=lambda name: ABSENT in coded[name][1]) for names in groups.values()]
    return [names[0] for names in ordered], {names[0]: tuple(names[1:]) for names in ordered}


def neighbours(levels: list[int]) -> list[tuple[int, int]]:
    """Each level with the next, and the first with the last."""
    return [*pairwise(levels), *([(levels[0], levels[-1])] if len(levels) > 2 else [])]


def joint(codes: Array) -> Array:
    """(n,) int64 from 0, equal where the rows of (n, S) codes are equal."""
    key = np.zeros(len(codes), np.int64)
    for column in codes.T:  # made dense at each step, so that no product of levels can overflow
        key = np.unique(key * (column.max(initial=0) + 1) + column, return_inverse=True)[1]
    return key
