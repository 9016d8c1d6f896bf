"""Pictures as files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl

from pipeline.metrics import Metric
from pipeline.results import DENSE, chance_level, headline, measured, valued
from pipeline.study.chains import costs, front, over_cells, paths
from pipeline.study.intervals import SHOWN
from pipeline.study.summary import curves, dense_value
from pipeline.study.terminal import TITLES

SPREAD = "middle half of the networks"
LEVELS = (SPREAD, "dense", "chance")  # of the legend, behind the methods
HEADROOM = 0.07  # of a panel, which a line of text above another line takes


def plot_curves(rows: pl.DataFrame, path: str | Path, title: str) -> None:
    """The headline over the ratio, one colour per method; one panel per stage, sharing the axes.

    Dotted: the uncompressed networks of the cells that have rows of the stage (without BatchNorm nothing is repaired).
    Dashed: chance, see `chance`. Shaded: the middle half of the networks, from SHOWN on.
    """
    plot_groups({"": rows}, path, title)


def plot_groups(groups: Mapping[str, pl.DataFrame], path: str | Path, title: str) -> None:
    """`plot_curves` of several groups of networks in one picture: a row of panels for each, under one legend.

    groups: {what to call it: its rows}, all of one headline. A method has one colour in all panels.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    metric = headline(pl.concat([rows.select("metric") for rows in groups.values()]))
    found = {label: curves(rows) for label, rows in groups.items()}
    stages = list(dict.fromkeys(stage for lines in found.values() for stage, _ in lines)) or ["raw"]
    methods = list(dict.fromkeys(method for lines in found.values() for _, method in lines))
    entries = len(methods) + len(LEVELS)
    across = entries if entries <= 3 * len(stages) else 2 * len(stages)  # columns of the legend below
    height = 0.9 + 3.3 * len(groups) + 0.22 * -(-entries // across)
    figure = Figure(figsize=(1.5 + 4.5 * len(stages), height), layout="constrained")
    panels = figure.subplots(len(groups), len(stages), sharex=True, sharey=True, squeeze=False)
    drawn: dict[str, Any] = {}
    for row, (label, rows) in zip(panels, groups.items(), strict=True):
        for panel, stage in zip(row, stages, strict=True):
            lines = {method: line for (of, method), line in found[label].items() if of == stage}
            if lines or not found[label]:
                drawn |= draw_panel(panel, rows, stage, lines, methods)
                panel.set_title(panel_title(label, stage, lines), fontsize=10)
            else:  # a group without BatchNorm has nothing that is repaired
                panel.set_axis_off()
        row[0].set_ylabel(metric.heading)
    masked = any(rows.select(pl.col("kind").eq_missing("mask").any()).item() for rows in groups.values())
    for panel in panels[-1]:
        panel.set_xlabel("fraction of channels removed" + ", of weights by masks" * masked)
    order = [name for name in (*methods, *LEVELS) if name in drawn]
    if order:
        figure.legend([drawn[name] for name in order], order, loc="outside lower center", ncols=across, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def panel_title(label: str, stage: str, lines: Mapping[str, pl.DataFrame]) -> str:
    """ "adam: raw (as compressed), n = 8"; how many networks a mean is over."""
    counts = [n for line in lines.values() for n in line["n"]]
    low, high = min(counts, default=0), max(counts, default=0)
    told = f"n = {low}{f' to {high}' if high > low else ''}"
    return f"{label}: " * bool(label) + f"{TITLES.get(stage, stage)}, {told}"


def draw_panel(
    panel: Any, rows: pl.DataFrame, stage: str, lines: Mapping[str, pl.DataFrame], methods: list[str]
) -> dict[str, Any]:
    """Draw the curves of a stage; gives {name in the legend: what was drawn}. lines: of `curves`, by method."""
    from matplotlib.patches import Patch

    metric, shaded = headline(rows), middle_halves(rows, stage)
    has = rows.filter((pl.col("stage") == stage) & (pl.col("method") != DENSE))
    dense = dense_value(rows.join(has.select("cell"), on="cell", how="semi") if len(has) else rows)
    drawn: dict[str, Any] = {}
    for method, line in lines.items():
        ratios, values = line["ratio"].to_list(), line["value"].to_list()
        if dense is not None and 0.0 not in ratios:
            ratios, values = [0.0, *ratios], [dense, *values]
        scaled, number = [metric.scale * value for value in values], methods.index(method)
        color, style = f"C{number % 10}", f"o{('-', '--', ':', '-.')[number // 10 % 4]}"  # ten colours come around
        drawn[method] = panel.plot(ratios, scaled, style, color=color, label=method, markersize=4)[0]
        if method in shaded:
            of = shaded[method]
            ends = [metric.scale * of[end] for end in ("low", "high")]
            panel.fill_between(of["ratio"], *ends, color=color, alpha=0.15, linewidth=0)
            drawn[SPREAD] = Patch(color="grey", alpha=0.3)
    if dense is not None:
        told = metric.text(dense)
        full = metric.higher_is_better and not metric.log and dense > 1 - HEADROOM
        drawn["dense"] = level(panel, metric.scale * dense, f"dense {told}", ":", below=full)
    if (by_chance := chance(rows, metric)) is not None:
        told = f"chance {100 * by_chance:g}%"
        drawn["chance"] = level(panel, metric.scale * by_chance, told, "--", left=True)
    if metric.log:
        panel.set_yscale("log")
        in_numbers(panel.yaxis)
    elif metric.higher_is_better:
        panel.set_ylim(0, metric.scale)
    panel.grid(alpha=0.3)
    return drawn


def level(panel: Any, height: float, text: str, style: str, left: bool = False, below: bool = False) -> Any:
    """A horizontal line with its text above or below it, at the right or the left end."""
    line = panel.axhline(height, color="grey", linestyle=style, linewidth=1, label=text)
    panel.annotate(
        text,
        (0.02 if left else 0.98, height),
        xytext=(0, -3 if below else 3),
        xycoords=panel.get_yaxis_transform(),
        textcoords="offset points",
        ha="left" if left else "right",
        va="top" if below else "bottom",
        fontsize=8,
        color="dimgrey",
    )
    return line


def middle_halves(rows: pl.DataFrame, stage: str) -> dict[str, pl.DataFrame]:
    """{method: its ratio, low and high}: the quartiles over networks, where there are at least SHOWN."""
    value = valued(rows)
    found = measured(rows).filter(pl.col("stage") == stage).group_by("method", "ratio", maintain_order=True)
    low, high = (value.quantile(at, "linear").alias(name) for name, at in (("low", 0.25), ("high", 0.75)))
    found = found.agg(low, high, n=pl.len()).filter(pl.col("n") >= SHOWN).sort("ratio", maintain_order=True)
    return {method: line for (method,), line in found.partition_by("method", as_dict=True, maintain_order=True).items()}


def chance(rows: pl.DataFrame, metric: Metric) -> float | None:
    """The headline of answers that are drawn blindly; None where these rows do not tell it, or not all the same.

    None on a log axis, too: the vocabulary lies orders of magnitude above the perplexities that are worth a look.
    """
    if metric.log:
        return None
    ok = rows.filter(pl.col("metric").eq_missing(metric.name) & (pl.col("status") == "ok"))
    known = ok.select(chance_level(ok)).to_series().unique()
    return known.item() if len(known) == 1 else None


def plot_pareto(rows: pl.DataFrame, path: str | Path | BinaryIO, times: pl.DataFrame | None = None) -> None:
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
            in_numbers(place.yaxis)
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
    from matplotlib.ticker import StrMethodFormatter

    if costs.max() > 5 * costs.min():
        place.set_xscale("log")
        in_numbers(place.xaxis)
    place.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def in_numbers(axis: Any) -> None:
    """A logarithmic axis with 50, 100, 200 at it and no powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
