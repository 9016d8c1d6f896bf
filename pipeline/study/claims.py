"""Effects as sentences."""

import polars as pl

from pipeline.study.noise import Noise
from pipeline.tasks import Metric


def claims(
    effects: pl.DataFrame, interactions: pl.DataFrame, noise: dict[str, Noise] | None, metric: Metric
) -> list[str]:
    """Sentences over the `effects` of one stage and ratio (or of several stages, the headline's first)."""
    raise NotImplementedError
