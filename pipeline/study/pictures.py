"""Pictures as files."""

from pathlib import Path
from typing import Any

import polars as pl

from pipeline.results import DENSE, headline
from pipeline.study.chains import costs, front, over_cells, paths
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


def plot_pareto(rows: pl.DataFrame, path: str | Path, times: pl.DataFrame | None = None) -> None:
    """The headline over the bytes of the file, and over the time of each runtime and batch size: a panel each.

    A chain is a line from the uncompressed network on, a stage a point; rings and the dashed steps mark the front, the
    networks that none beats in both. The means over cells are drawn. times: `median` seconds by chain, runtime and
    batch_size (see Profile).
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    metric, found = headline(rows), over_cells(rows)
    panels, lines = costs(found, times), paths(found["chain"])
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    height = down * 4 + 0.25 * len(lines)
    figure = Figure(figsize=(1 + 5 * across, height), layout="constrained")
    places = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    drawn: dict[str, Any] = {}
    for place, (heading, points) in zip(places, panels.items(), strict=False):
        for number, (leaf, chain) in enumerate(lines.items()):
            line = pl.DataFrame({"chain": chain}).join(points, on="chain", maintain_order="left")
            y = line["value"] * metric.scale
            drawn[leaf or DENSE] = place.plot(line["cost"], y, "o-", color=f"C{number % 10}", markersize=4, lw=1)[0]
        best = points[front(points["cost"], points["value"], metric.higher_is_better)]
        x, y = best["cost"], best["value"] * metric.scale
        place.step(x, y, where="post", color="grey", linestyle="--", linewidth=0.8, zorder=0)
        drawn["the front"] = place.plot(x, y, "o", markersize=10, markerfacecolor="none", color="black")[0]
        scale_costs(place, points["cost"])
        if metric.log:
            place.set_yscale("log")
        place.set_xlabel(heading)
        place.grid(alpha=0.3, which="both")
    for place in places[len(panels) :]:
        place.set_axis_off()
    for place in places[::across]:
        place.set_ylabel(metric.heading)
    front_last = {name: drawn[name] for name in (*(n for n in drawn if n != "the front"), "the front") if name in drawn}
    figure.legend(front_last.values(), front_last.keys(), loc="outside lower center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def scale_costs(place: Any, costs: pl.Series) -> None:
    """The x-axis of a panel: logarithmic where costs differ much, with numbers that people read."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if costs.max() > 5 * costs.min():
        place.set_xscale("log")
        place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.xaxis.set_minor_formatter(NullFormatter())
    place.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
