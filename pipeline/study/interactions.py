"""Where the effect of one setting depends on the level of another."""

import polars as pl

from pipeline.study.lines import Lines


def interactions(found: Lines, stage: str, ratio: float | None, outcome: str = "fold") -> pl.DataFrame:
    """setting, low, high, other, other_low, other_high, effect_low, half_low, n_low, effect_high, half_high, n_high,
    difference, half, n, p, p_holm, flips
    """
    raise NotImplementedError
