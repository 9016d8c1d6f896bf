"""Methods over many networks (rliable, arXiv:2108.13264)."""

import polars as pl

from pipeline.study.lines import Lines


def interquartile_mean(found: Lines, stage: str, ratio: float | None) -> pl.DataFrame:
    """method, kind, value, low, high, n, recipes"""
    raise NotImplementedError


def profiles(found: Lines, stage: str, ratio: float | None) -> pl.DataFrame:
    """method, kind, loss (points below the uncompressed network), share, low, high, n, recipes"""
    raise NotImplementedError


def improvement(found: Lines, stage: str, ratio: float | None) -> pl.DataFrame:
    """method (that folds), other (that prunes), probability, low, high, n, recipes"""
    raise NotImplementedError
