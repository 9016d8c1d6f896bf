"""What a setting does to foldability: matched pairs, a t-interval over recipes, Holm over the family."""

from collections.abc import Sequence

import polars as pl

from pipeline.study.lines import Lines

OUTCOMES = ("fold", "base", "gap")  # headline first


def pairs(table: pl.DataFrame, setting: str, settings: Sequence[str], low: object, high: object) -> pl.DataFrame:
    """One line per matched pair: recipe (the other settings), and <outcome>_low, <outcome>_high, <outcome>."""
    raise NotImplementedError


def effects(found: Lines, stage: str, ratio: float | None, outcomes: Sequence[str] = OUTCOMES) -> pl.DataFrame:
    """setting, low, high, outcome, where, effect, half, n, p, p_holm, sd, needed; also stage, ratio and along."""
    raise NotImplementedError
