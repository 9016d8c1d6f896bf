"""Pictures as files."""

from pathlib import Path
from typing import Any

import polars as pl

from pipeline.results import DENSE, headline
from pipeline.study.summary import curves, dense_value
from pipeline.study.terminal import TITLES


def plot_curves(rows: pl.DataFrame, path: str | Path, title: str) -> None:
    """The headline over the ratio, one colour per method; one panel per stage, sharing the axes.

    Dotted: the uncompressed networks of the cells that have rows of the stage (without BatchNorm nothing is repaired).
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    found, metric = curves(rows), headline(rows)
    stages = list(dict.fromkeys(stage for stage, _ in found)) or ["raw"]
    methods = list(dict.fromkeys(method for _, method in found))
    masked = rows.select(pl.col("kind").eq_missing("mask").any()).item()
    across = 2 * len(stages)  # columns of the legend below
    height = 4.2 + 0.22 * -(-len(methods) // across)
    figure = Figure(figsize=(1.5 + 4.5 * len(stages), height), layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    drawn: dict[str, Any] = {}
    for panel, stage in zip(panels, stages, strict=True):
        has = rows.filter((pl.col("stage") == stage) & (pl.col("method") != DENSE))
        dense = dense_value(rows.join(has.select("cell"), on="cell", how="semi") if len(has) else rows)
        for (s, method), line in found.items():
            if s != stage:
                continue
            ratios, values = line["ratio"].to_list(), line["value"].to_list()
            if dense is not None and 0.0 not in ratios:
                ratios, values = [0.0, *ratios], [dense, *values]
            scaled = [metric.scale * value for value in values]
            place = methods.index(method)
            style = f"o{('-', '--', ':', '-.')[place // 10 % 4]}"  # ten colours come around
            drawn[method] = panel.plot(ratios, scaled, style, color=f"C{place % 10}", label=method, markersize=4)[0]
        if dense is not None:
            dotted = panel.axhline(
                metric.scale * dense, color="grey", linestyle=":", label=f"dense {metric.text(dense)}"
            )
            corner = "upper right" if metric.higher_is_better else "upper left"  # where no curve ends
            panel.legend(handles=[dotted], frameon=False, loc=corner)
        panel.set_title(TITLES.get(stage, stage), fontsize=10)
        panel.set_xlabel("fraction of channels removed" + ", of weights by masks" * masked)
        if metric.log:
            panel.set_yscale("log")
        elif metric.higher_is_better:
            panel.set_ylim(0, metric.scale)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(metric.heading)
    if drawn:
        figure.legend(handles=list(drawn.values()), loc="outside lower center", ncols=across, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
