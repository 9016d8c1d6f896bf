"""The tables and the picture of docs/language.md, from the rows that benchmarks.language has written."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, mode, stdev
from typing import Any

from benchmarks.common import write_below
from pipeline.study.intervals import SHOWN, half_interval

RESULTS = Path(__file__).parent / "results"
PAGE, MARK = Path("docs/language.md"), "<!-- written by benchmarks.language -->"
SEES = re.compile(r"data|self|unigram|wanda-sp|flap|grail")  # plans that look at texts
WIDE = 3  # panels of the picture side by side
DRAWN = (
    *("fold", "l2", "wanda-sp", "flap", "grail"),
    *("fold+data+params", "obs+data+params", "obs+self+params", "obs+data", "obs+self"),
)

Row = dict[str, Any]


def page() -> None:
    """Tables and the picture of docs/language.md."""
    lines = []
    for rows in networks():
        for text in texts_of(rows):
            lines += [*table(rows, text), ""]
    write_below(PAGE, MARK, "Language models", lines)
    picture()


def networks() -> list[list[Row]]:
    """The rows of every network that was measured."""
    found: dict[str, list[Row]] = defaultdict(list)
    for path in sorted(RESULTS.glob("language_*.json"), reverse=True):  # the networks of others first
        for row in json.loads(path.read_text()):
            found[row["network"]].append(row)
    return list(found.values())


def texts_of(rows: Sequence[Row]) -> list[str]:
    """The texts that any row was measured on, in their order."""
    return list(dict.fromkeys(text for row in rows for text in row["perplexity"]))


def table(rows: Sequence[Row], text: str) -> list[str]:
    """One network on one text, a line for each plan and number of windows."""
    rows = [row for row in rows if text in row["perplexity"]]
    dense = next(row for row in rows if row["plan"] == "dense")
    ratios = sorted({row["ratio"] for row in rows} - {0.0})
    found = values_of(rows, text)
    plans = dict.fromkeys((row["plan"], row["windows"]) for row in rows if row["plan"] != "dense")
    return [
        f"### {dense['network']} on {text}: dense {dense['perplexity'][text]:.2f}, {dense['tokens'][text]:,} tokens",
        "",
        "| method | texts | " + " | ".join(f"{ratio:.0%} gone" for ratio in ratios) + " |",
        "|---|---|" + "---|" * len(ratios),
        *(
            f"| {plan} | {seen_by(plan, windows, max(len(found[plan, windows, r]) for r in ratios))} | "
            + " | ".join(cell(found[plan, windows, ratio]) for ratio in ratios)
            + " |"
            for plan, windows in plans
        ),
    ]


def values_of(rows: Sequence[Row], text: str) -> dict[tuple[str, int, float], list[float]]:
    """{(plan, windows, ratio): perplexities, one for each draw}; [] of what was not measured."""
    found: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for row in rows:
        if text in row["perplexity"]:
            found[row["plan"], row["windows"], row["ratio"]].append(row["perplexity"][text])
    return found


def seen_by(plan: str, windows: int, draws: int) -> str:
    """How many texts a plan looks at: nothing for one that looks at none, "3 x 32" for three draws of 32."""
    if not SEES.search(plan):
        return ""
    return f"{draws} x {windows}" if draws > 1 else f"{windows}"


def cell(values: Sequence[float]) -> str:
    """The mean over draws, and half of its 95% interval where there are three."""
    if not values:
        return ""
    mean, n = fmean(values), len(values)
    told = f"{mean:,.0f}" if mean >= 1000 else f"{mean:.2f}"
    return told if n < SHOWN else f"{told} ± {half_interval(stdev(values), n):.2f}"


def picture() -> None:
    """Perplexity over the ratio, the mean over draws, one panel for each network, on a log axis.

    A panel shows one number of texts that methods look at, the one with most rows.
    """
    import matplotlib.pyplot as plt

    shown, drawn = networks(), dict[str, Any]()
    high = -(-len(shown) // WIDE)
    figure, axes = plt.subplots(high, WIDE, figsize=(5 * WIDE + 2, 4.2 * high), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, rows in zip(axes.flat, shown, strict=False):
        text = next(iter(rows[0]["perplexity"]))
        dense = rows[0]["perplexity"][text]
        counts = [row["windows"] for row in rows if row["plan"] in DRAWN and SEES.search(row["plan"])]
        usual = mode(counts) if counts else None
        found = values_of(rows, text)
        for number, plan in enumerate(DRAWN):
            points = [
                (ratio, fmean(values))
                for (name, windows, ratio), values in found.items()
                if name == plan and (windows == usual or not SEES.search(plan))
            ]
            if points:
                line = zip((0.0, dense), *sorted(points), strict=True)
                drawn[plan] = axis.plot(*line, marker="o", markersize=3, color=f"C{number}")[0]
        axis.set(yscale="log", xlabel="feed-forward channels removed", title=f"{rows[0]['network']}, {text}")
        axis.set_ylim(top=min(axis.get_ylim()[1], dense * 25))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("perplexity")
    told = [plan for plan in DRAWN if plan in drawn]
    figure.legend([drawn[plan] for plan in told], told, loc="outside right upper")
    figure.savefig(PAGE.with_suffix(".png"), dpi=130)
