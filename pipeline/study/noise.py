"""How far networks of one recipe are apart, and how many pairs would show one point in spite of it."""

from dataclasses import dataclass

from pipeline.study.lines import Lines


@dataclass(frozen=True)
class Noise:
    """sd over seeds within recipes, of one outcome; reliability is the share of the variance between recipes."""

    sd: float
    recipes: int
    cells: int
    reliability: float | None
    reliability_low: float | None
    reliability_high: float | None
    needed: int


def noise(found: Lines, stage: str, ratio: float | None) -> dict[str, Noise] | None:
    """Noise by outcome; None where no recipe has two seeds."""
    raise NotImplementedError
