"""Tables and pictures over rows: of one run, or the mean over the cells of a sweep."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit
from scipy.stats import spearmanr

from pipeline.results import DENSE, headline, means, measured, side, valued
from pipeline.tasks import Metric

TITLES = {
    "raw": "raw (as compressed)",
    "repaired": "repaired (statistics re-estimated)",
    "norm_tuned": "norms tuned",
    "tuned": "repaired, then tuned",
}
HEADLINE_STAGES = ("repaired", "raw", "norm_tuned", "tuned")  # the first of them that a cell has is its headline
HEADLINE_RATIO = 0.5
SURE = 0.02  # a smaller gap is within the noise of some thousand pictures
PER_CELL = ["cell", "stage", "ratio"]


def last_measurement(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of each cell's last measured epoch: those of the test set if there are any, else of validation."""
    epochs = [pl.col("epoch").filter(pl.col("split") == split).max().alias(split) for split in ("test", "val")]
    last = rows.group_by("cell").agg(epochs)
    last = last.select(
        "cell",
        split=pl.when(pl.col("test").is_not_null()).then(pl.lit("test")).otherwise(pl.lit("val")),
        epoch=pl.coalesce("test", "val"),
    )
    return rows.join(last, on=["cell", "split", "epoch"], how="semi", maintain_order="left")


def curves(rows: pl.DataFrame) -> dict[tuple[str, str], pl.DataFrame]:
    """{(stage, method): its lines of `means`}, by stage, then in the order of the rows."""
    return means(rows).partition_by("stage", "method", as_dict=True, maintain_order=True)


def dense_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of uncompressed networks that have a value of the headline."""
    value = valued(rows)
    ok = (pl.col("status") == "ok") & value.is_not_null() & value.is_not_nan()
    return rows.filter(ok & (pl.col("method") == DENSE))


def dense_value(rows: pl.DataFrame) -> float | None:
    """Mean headline of the uncompressed networks."""
    return dense_rows(rows).select(valued(rows).mean()).item()


def duels(rows: pl.DataFrame) -> pl.DataFrame:
    """One line per cell, stage and ratio: fold and prune, the best headline of each side, and gap, fold's lead.

    A side without rows is null (see results.side). Pass the rows of `last_measurement`.
    """
    return _duels(rows, valued(rows))


def _duels(rows: pl.DataFrame, value: pl.Expr, higher_is_better: bool | None = None) -> pl.DataFrame:
    upward = headline(rows).higher_is_better if higher_is_better is None else higher_is_better
    found = measured(rows).with_columns(side=side(), of_side=value)
    best = pl.col("of_side").max() if upward else pl.col("of_side").min()
    found = found.filter(pl.col("side").is_not_null()).group_by(*PER_CELL, "side", maintain_order=True).agg(best)
    found = found.pivot("side", index=PER_CELL, values="of_side")
    missing = [pl.lit(None, pl.Float64).alias(name) for name in ("fold", "prune") if name not in found.columns]
    found = found.with_columns(missing).select(*PER_CELL, "fold", "prune")
    gap = pl.col("fold") - pl.col("prune")
    return found.with_columns(gap=gap if upward else -gap)


def gaps(rows: pl.DataFrame) -> pl.DataFrame:
    """One line per stage and ratio: n cells that have both sides, the mean gap over them, its margin, and wins.

    gap: by how much the best folding leads the best pruning; margin: half of its 95% interval (Student's t over cells),
    null when n < 3; wins: fraction of the cells in which folding is strictly better
    """
    gap = pl.col("gap")
    found = duels(rows).drop_nulls("gap").group_by("stage", "ratio", maintain_order=True)
    found = found.agg(gap.mean(), n=pl.len(), std=gap.std(), wins=(gap > 0).mean())
    margins = [half_interval(std, n) if n >= 3 else None for std, n in found["std", "n"].iter_rows()]
    return found.with_columns(margin=pl.Series(margins, dtype=pl.Float64)).drop("std")


def half_interval(std: float, n: int) -> float:
    """Half of the 95% interval of a mean of n (Student's t), from their standard deviation."""
    return stdtrit(n - 1, 0.975) * std / n**0.5


class Foretold(NamedTuple):
    """How well `fidelity`, which sees no data, ranks raw results: Spearman's correlations, and how many went in.

    value: correlation of fidelity with the headline, over the n raw rows (networks, methods and ratios)
    gap: correlation of the gap in fidelity (best folding less best pruning) with the gap in the headline, over `gaps`
        pairs of network and ratio
    sign: fraction, of the `sure` gaps larger than SURE either way, in which fidelity names the winner
    """

    value: float
    n: int
    gap: float
    gaps: int
    sign: float
    sure: int


def foretold(rows: pl.DataFrame) -> Foretold | None:
    """Foretold over the rows of `last_measurement`; None where fewer than three results have a fidelity."""
    known = pl.col("fidelity").is_not_null() & pl.col("fidelity").is_not_nan()
    found = measured(rows).filter(known & (pl.col("stage") == "raw"))
    if len(found) < 3:
        return None
    better = 1 if headline(rows).higher_is_better else -1
    gap = (
        duels(found)
        .join(_duels(found, pl.col("fidelity"), True), on=PER_CELL, suffix="_foretold")
        .drop_nulls(["gap", "gap_foretold"])
    )
    sure = gap.filter(pl.col("gap").abs() > SURE)
    right = (sure["gap"].sign() == sure["gap_foretold"].sign()).mean() if len(sure) else math.nan
    return Foretold(
        better * float(spearmanr(found["fidelity"], found.select(valued(rows)).to_series()).statistic),
        len(found),
        float(spearmanr(gap["gap_foretold"], gap["gap"]).statistic) if len(gap) > 2 else math.nan,
        len(gap),
        right,
        len(sure),
    )


def headlines(rows: pl.DataFrame) -> pl.DataFrame:
    """One line per cell: split and epoch of its last measurement, dense value, and one line of `duels`.

    The duel is that of the first of HEADLINE_STAGES that the cell has, at its ratio nearest to HEADLINE_RATIO. Null
    where unknown.
    """
    last = last_measurement(rows)
    ranks = {stage: i for i, stage in enumerate(HEADLINE_STAGES)}
    rank = pl.col("stage").replace_strict(ranks, default=len(ranks), return_dtype=pl.Int64)
    # Rounded, so that 0.4 and 0.6 are equally near, whatever their last bits.
    nearness = (pl.col("ratio") - HEADLINE_RATIO).abs().round(9)
    duel = duels(last).sort(rank, nearness, "ratio").unique("cell", keep="first", maintain_order=True)
    dense = dense_rows(last).group_by("cell").agg(dense=valued(rows).mean())
    lines = last.group_by("cell", maintain_order=True).agg(pl.col("split", "epoch").first())
    return lines.join(dense, on="cell", how="left").join(duel, on="cell", how="left")


def parameters_left(rows: pl.DataFrame) -> dict[float, float]:
    """{ratio: fraction of the parameters that stay, mean over the measured rows}

    Stages that compress once more are left out where there are others.
    """
    dense = rows.filter(pl.col("method") == DENSE).group_by("cell").agg(dense=pl.col("params").max())
    found = measured(rows)
    once = found.filter(~pl.col("stage").str.contains("@", literal=True))
    kept = (
        (found if once.is_empty() else once)
        .join(dense, on="cell")
        .with_columns(kept=pl.col("params") / pl.col("dense"))
    )
    kept = kept.group_by("ratio").agg(pl.col("kept").drop_nans().mean())
    return {ratio: left for ratio, left in kept.iter_rows() if left is not None}


def result_table(rows: pl.DataFrame, duel: bool = False) -> Table:
    """Methods x ratios, mean headline, the best method of each stage and ratio in bold; failed ones are marked.

    duel: add below each stage the gap of folding to pruning over the cells (`gaps`), in points
    """
    metric = headline(rows)
    ratios = sorted(set(rows.filter(pl.col("method") != DENSE)["ratio"]))
    table = Table()
    table.add_column("ratio removed", no_wrap=True)
    for ratio in ratios:
        table.add_column(f"{ratio:g}", justify="right")
    masked = pl.col("kind").eq_missing("mask")
    for name, kind in {"parameters left": ~masked, "parameters not masked": masked}.items():
        left = parameters_left(rows.filter(kind | (pl.col("method") == DENSE)))
        if left:
            table.add_row(name, *(f"{left[r]:.0%}" if r in left else "-" for r in ratios))
    found = curves(rows)
    compared = gaps(rows) if duel else None
    for stage in dict.fromkeys(stage for stage, _ in found):
        table.add_section()
        table.add_row(f"[dim]{escape(TITLES.get(stage, stage))}[/]")
        lines = {method: line for (s, method), line in found.items() if s == stage}
        for method, cells in _values(lines, ratios, rows["cell"].n_unique(), metric).items():
            table.add_row(f"  {escape(method)}", *cells)
        if compared is not None:
            at = {line["ratio"]: line for line in compared.filter(pl.col("stage") == stage).iter_rows(named=True)}
            for name, show in DUEL_LINES.items():
                table.add_row(f"  [dim]{name}[/]", *(show(at[r], metric) if r in at else "-" for r in ratios))
    return table


def _values(lines: dict[str, pl.DataFrame], ratios: list[float], cells: int, metric: Metric) -> dict[str, list[str]]:
    """{label: its values as text}; the label of a method that some cells lack says how many the mean is over."""
    by_ratio = {method: dict(line.select("ratio", "value").iter_rows()) for method, line in lines.items()}
    pick_best = max if metric.higher_is_better else min
    best = {r: pick_best((line[r] for line in by_ratio.values() if r in line), default=None) for r in ratios}
    found = {}
    for method, line in by_ratio.items():
        texts = [metric.short(line[r]).strip() if r in line else "failed" for r in ratios]
        low, high = lines[method]["n"].min(), lines[method]["n"].max()
        label = method if low >= cells else f"{method} (n {low}{f'-{high}' if high > low else ''})"
        found[label] = [
            f"[bold]{t}[/]" if r in line and line[r] == best[r] else t for r, t in zip(ratios, texts, strict=True)
        ]
    return found


def points(value: float, metric: Metric) -> str:
    """A difference in the digits of the metric, with its sign."""
    return f"{metric.scale * value:+.{metric.digits}f}"


DUEL_LINES = {
    "gap, points": lambda at, metric: points(at["gap"], metric),
    "95% interval": lambda at, metric: "-" if at["margin"] is None else f"±{points(at['margin'], metric)[1:]}",
    "win rate": lambda at, metric: f"{at['wins']:.0%}",
    "n cells": lambda at, metric: f"{at['n']}",
}


def terminal() -> Console:
    """The console for tables. A pipe has no width of its own, and eleven columns do not fit into 80 characters."""
    return Console(highlight=False, width=None if Console().is_terminal else 120)


def print_table(rows: pl.DataFrame, title: str, duel: bool = False) -> None:
    """The table of a run, or of several, on the terminal, and a line for each reason why something failed."""
    console = terminal()
    console.print(
        title, style="bold", markup=False, soft_wrap=True
    )  # not the table's own title, which a narrow table breaks into pieces
    console.print(result_table(rows, duel))
    failed = rows.filter(pl.col("status") == "failed").group_by("reason", maintain_order=True).len()
    for reason, count in failed.iter_rows():
        console.print(f"{count} measurements failed: {reason}", markup=False, soft_wrap=True)


def speed_lines(speeds: pl.DataFrame) -> pl.DataFrame:
    """One line per (ratio, method, params, runtime, batch_size): medians over the cells of `read_speeds`.

    median: seconds; speedup: over the uncompressed network, timed beside it; macs: of one sample; size, memory: bytes
    """
    values = ["median", "speedup", "macs", "size", "memory"]
    keys = ["ratio", "method", "params", "runtime", "batch_size"]
    lines = speeds.fill_nan(None).group_by(keys, maintain_order=True).agg(pl.col(values).median())
    return lines.sort("ratio", maintain_order=True)


def speed_table(speeds: pl.DataFrame) -> Table:
    """Ratios x sizes and times: the networks of one model, timed on one kind of device."""
    lines = speed_lines(speeds)
    columns = list(dict.fromkeys(lines.select("runtime", "batch_size").iter_rows()))
    table = Table()
    for name in ("ratio removed", "parameters", "MACs", "file"):
        table.add_column(name, justify="right", no_wrap=True)
    for runtime, size in columns:
        table.add_column(f"{runtime}, batch {size}", justify="right")
    largest = next((c for c in sorted(columns, key=lambda c: -c[1]) if c[0] != "onnx"), None)  # onnx hides its memory
    if largest:
        table.add_column(f"memory, batch {largest[1]}", justify="right")
    by_network = lines.partition_by("ratio", "method", "params", as_dict=True, maintain_order=True)
    ratios = [ratio for ratio, _, _ in by_network]
    for (ratio, method, params), of in by_network.items():
        label = DENSE if method == DENSE else f"{ratio:g}" + f" {method}" * (ratios.count(ratio) > 1)
        at = {(line["runtime"], line["batch_size"]): line for line in of.iter_rows(named=True)}
        times = [timed(at.get(column)) for column in columns]
        memory = at.get(largest, {}).get("memory")
        table.add_row(
            label,
            f"{params / 1e6:,.2f} M",
            f"{of['macs'][0] / 1e6:,.0f} M",
            f"{of['size'][0] / 1e6:,.1f} MB",
            *times,
            *(["-" if memory is None else f"{memory / 1e6:,.0f} MB"] if largest else []),
        )
    return table


def timed(line: dict[str, Any] | None) -> str:
    """5.31 ms (2.4x), 1,234 ms (2.4x)"""
    if line is None or line["median"] is None:
        return "-"
    faster = "" if line["speedup"] is None else f" ({line['speedup']:.1f}x)"
    milliseconds = 1000 * line["median"]
    return f"{milliseconds:,.0f} ms{faster}" if milliseconds >= 100 else f"{milliseconds:.3g} ms{faster}"


def print_speeds(speeds: pl.DataFrame) -> None:
    """A table for every model and kind of device, and a line for each reason why times are missing."""
    if speeds.is_empty():
        return
    console = terminal()
    kinds = speeds.partition_by("model", "data", "device", "threads", as_dict=True, maintain_order=True)
    for (model, data, device, threads), of in kinds.items():
        n = of["cell"].n_unique()
        cells = f", median of {n} cells" if n > 1 else ""
        place = f"{device}, {threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
        title = f"Size and speed of {model} on {data} ({place}{cells}); in brackets how many times as fast as dense"
        console.print(title, style="bold", markup=False, soft_wrap=True)
        console.print(speed_table(of))
        failed = of.filter(pl.col("reason") != "").group_by("runtime", "reason", maintain_order=True).len()
        for runtime, reason, count in failed.iter_rows():
            console.print(f"{count} times of {runtime} are missing: {reason}", markup=False, soft_wrap=True)


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
