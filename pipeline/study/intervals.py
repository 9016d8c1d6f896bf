"""Student's t over the rows of arrays, Holm's correction, and the n that an interval needs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

Array = np.ndarray
SHOWN = 3  # values that an interval or a rate is shown from; that of two is wider than anything it could tell
POINT = 1.0  # the half-interval that `needed` asks for, in points (see lines.in_points)


def half_interval(sd: Any, n: Any) -> Any:
    """Half of the 95% interval of a mean of n (Student's t), from their standard deviation; NaN for n < 2.

    sd, n: numbers, or arrays of one shape
    """
    return stdtrit(n - 1, 0.975) * sd / n**0.5


def shown_half(sd: float | None, n: int) -> float | None:
    """`half_interval` of at least SHOWN values; None of fewer."""
    return None if sd is None or n < SHOWN else float(half_interval(sd, n))


@dataclass(frozen=True)
class Summary:
    """The mean of each column of an (n, V) array that has gaps (NaN).

    mean, half (of the 95% interval, Student's t), p (two-sided, of a mean of 0), sd: (V,) float64, NaN where n is too
    small for them; n: (V,) int64, values that are there
    """

    mean: Array
    half: Array
    p: Array
    sd: Array
    n: Array


def summary(values: Array) -> Summary:
    """values: (n, V) float64, independent rows; NaN: not measured."""
    there = ~np.isnan(values)
    n = there.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(there, values, 0).sum(0) / n
        squares = (np.where(there, values - mean, 0) ** 2).sum(0)
        sd = np.sqrt(squares / (n - 1))
        sd = np.where(n > 1, sd, np.nan)
        error = sd / np.sqrt(n)
        p = 2 * stdtr(n - 1, -np.abs(mean / error))
        half = half_interval(sd, n)
    p = np.where((error == 0) & (mean == 0), 1.0, p)  # 0 / 0: not a trace of an effect
    return Summary(mean, half, p, sd, n)


def holm(p: Array) -> Array:
    """Holm's adjusted p-values: rejecting those below a keeps the chance of any false rejection below a.

    Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979). p: (m,) float64; NaN is
    no test and stays NaN.
    """
    order = np.argsort(p)[: (~np.isnan(p)).sum()]  # NaN comes last
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1)
    return adjusted


def needed(sd: float | None, half: float = POINT) -> int | None:
    """The fewest pairs whose 95% t-interval has at most this half, if their differences keep this sd; None: sd unknown.

    Solves n >= (t(n - 1) sd / half)^2 from below, where the left side grows and the right side falls.
    """
    if sd is None or np.isnan(sd):
        return None
    n = max(2, int((1.95 * sd / half) ** 2))
    while half_interval(sd, n) > half:
        n += 1
    return n
