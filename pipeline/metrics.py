"""The numbers that tasks measure: a metric is a row. Tables of results read them, so torch stays out of this file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How people read a number, and which of two numbers is the better one.

    scale, unit, digits: a value v is read as f"{scale * v:.{digits}f}{unit}", unless it is huge
    log: compared on a log axis; foldability is then an area under the logarithm
    """

    name: str
    title: str
    higher_is_better: bool = True
    scale: float = 1.0
    unit: str = ""
    digits: int = 1
    log: bool = False

    @property
    def heading(self) -> str:
        """Heading of a column: "Accuracy (%)"."""
        unit = self.unit.strip()
        return f"{self.title[0].upper()}{self.title[1:]}" + f" ({unit})" * bool(unit)

    def text(self, value: float) -> str:
        """The value as a sentence has it: "71.3%", "0.412 nats"."""
        return f"{self.number(value)}{self.unit}"

    def short(self, value: float) -> str:
        """The value as a column has it, without unit: aligned to the right, seven places wide."""
        return f"{self.number(value):>7}"

    def number(self, value: float) -> str:
        """From a million on with an exponent, as perplexities of broken networks need it."""
        scaled = self.scale * value
        return f"{scaled:.{self.digits}f}" if not 1e6 <= scaled < float("inf") else f"{scaled:.1e}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("acc", "accuracy", scale=100, unit="%"),
        Metric("loss", "loss", higher_is_better=False, unit=" nats", digits=3),
        Metric("miou", "mean IoU", scale=100, unit="%"),
        Metric("exact", "samples with every label right", scale=100, unit="%"),
        Metric("perplexity", "perplexity", higher_is_better=False, log=True),
        Metric("token_acc", "token accuracy", scale=100, unit="%"),
        Metric("bits_per_byte", "bits per byte", higher_is_better=False, digits=3),
    )
}
