"""Numbers and names as sentences have them."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.metrics import Metric

# Settings that people know by another name.
SUBJECTS = {
    "augment": "Augmentation",
    "l1": "L1 penalty",
    "l2": "L2 penalty",
    "label_smoothing": "Label smoothing",
    "lr": "Learning rate",
    "momentum": "Momentum",
    "optim": "Optimizer",
    "rand_aug": "RandAugment",
    "rho": "SAM",
    "schedule": "Schedule",
    "wd": "Weight decay",
    "weight_decay": "Weight decay",
}
STAGES = {"raw": "raw", "repaired": "repaired", "norm_tuned": "norms tuned"}


def named(line: Mapping[str, Any]) -> str:
    """A step of a setting: "SAM (rho 0 to 0.05, where l1=0)", "Optimizer (adam to sgd and with it momentum)"."""
    name = line["setting"]
    subject = SUBJECTS.get(name.rsplit(".", 1)[-1])
    known = subject is not None and subject.lower().replace(" ", "_") == name
    along = f" and with it {line['along']}" if line.get("along") else ""
    where = f", where {line['where']}" if line.get("where") else ""
    steps = f"{line['low']} to {line['high']}{along}{where}"
    return f"{subject or name} ({steps})" if subject is None or known else f"{subject} ({name} {steps})"


def place(stage: str, ratio: float | None) -> str:
    """ "at half of the channels, repaired," """
    where = "over all ratios" if ratio is None else "at half of the channels"
    if ratio not in (None, 0.5):
        where = f"with {ratio:.0%} of the channels removed"
    return f"{where}, {STAGES.get(stage, stage)},"


def outcome_name(outcome: str, metric: Metric) -> str:
    """ "the accuracy that folding leaves" """
    return {
        "fold": f"the {metric.title} that folding leaves",
        "base": f"the {metric.title} of uncompressed networks",
        "gap": "the lead of folding over the best pruning",
    }[outcome]


def outcome_at(line: Mapping[str, Any], metric: Metric) -> str:
    return f"{outcome_name(line['outcome'], metric)} {place(line['stage'], line['ratio'])}".removesuffix(",")


def change(effect: float, what: str, half: float, outcome: str, metric: Metric) -> str:
    """ "raises the accuracy ..., repaired, by 4.2 ± 1.1 points"; the direction is that of the number."""
    verb = "raises" if effect > 0 else "lowers"
    worse = (effect > 0) != (metric.higher_is_better or outcome == "gap")
    judged = "" if metric.higher_is_better or outcome == "gap" else f", which is {'worse' if worse else 'better'}"
    if metric.log and effect < 0:
        return f"{verb} {what}, by {_per_cent(effect, half, absolute=True)}{judged}"
    return f"{verb} {what}, by {amount(abs(effect), half, metric)}{judged}"


def signed(effect: float, half: float | None, metric: Metric, bare: bool = False) -> str:
    """ "+4.2 ± 1.1 points"; bare: without the unit."""
    if metric.log:
        return _per_cent(effect, half)
    text = f"{effect:+.{digits(half, metric)}f}"
    text += "" if half is None else f" ± {half:.{digits(half, metric)}f}"
    return text if bare else f"{text}{unit(metric)}"


def around(effect: float, half: float | None, metric: Metric) -> str:
    """The interval of an effect alone: "±1.1"; "+3.1% to +5.5%" on a log axis, where it is not symmetric; "-": none."""
    if half is None:
        return "-"
    if not metric.log:
        return f"±{half:.{digits(half, metric)}f}"
    return " to ".join(_per_cent(end, None) for end in (effect - half, effect + half))


def amount(value: float, half: float | None, metric: Metric) -> str:
    """A difference without a sign: "4.2 ± 1.1 points"; "4.3% (3.1% to 5.5%)" on a log axis."""
    return signed(value, half, metric).lstrip("+") if not metric.log else _per_cent(value, half, absolute=True)


def _per_cent(effect: float, half: float | None, absolute: bool = False) -> str:
    """100 times a difference of logarithms as per cent of the number itself, with its interval.

    The interval is not symmetric in per cent, so both of its ends are told.
    """
    ends = [effect] if half is None else [effect, effect - half, effect + half]
    values = [100 * math.expm1(end / 100) for end in ends]
    if absolute and effect < 0:
        values = [-value for value in (values[0], *values[:0:-1])]
    texts = [f"{value:.1f}%" if absolute else f"{value:+.1f}%" for value in values]
    return texts[0] if half is None else f"{texts[0]} ({texts[1]} to {texts[2]})"


def digits(half: float | None, metric: Metric) -> int:
    """As the metric has them, more where the interval is narrower than these."""
    return metric.digits if not half else max(metric.digits, min(3, math.ceil(-math.log10(half))))


def unit(metric: Metric) -> str:
    return " points" if metric.scale == 100 else metric.unit or f" {metric.title}"


def one_point(metric: Metric) -> str:
    """The difference that `needed` speaks of."""
    return "one per cent" if metric.log else f"one{unit(metric).removesuffix('s')}"
