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

from pipeline.compression.compress import AUTO
from pipeline.compression.masks import MASKS
from pipeline.compression.methods import FOLDING
from pipeline.results import DENSE, means, measured

TITLES = {"raw": "raw (as compressed)", "repaired": "repaired (statistics re-estimated)", "norm_tuned": "norms tuned"}
HEADLINE_STAGES = ("repaired", "raw", "norm_tuned")  # the first of them that a cell has is its headline
HEADLINE_RATIO = 0.5
SURE = 0.02  # gaps of less are within the noise of some thousand pictures
PER_CELL = ["cell", "stage", "ratio"]


def last_measurement(rows: pl.DataFrame) -> pl.DataFrame:
    """Of each cell the rows of the test set if there are any, else those of validation, at the last epoch measured."""
    epochs = [pl.col("epoch").filter(pl.col("split") == split).max().alias(split) for split in ("test", "val")]
    last = rows.group_by("cell").agg(epochs)
    last = last.select(
        "cell",
        split=pl.when(pl.col("test").is_not_null()).then(pl.lit("test")).otherwise(pl.lit("val")),
        epoch=pl.coalesce("test", "val"),
    )
    return rows.join(last, on=["cell", "split", "epoch"], how="semi", maintain_order="left")


def curves(rows: pl.DataFrame) -> dict[tuple[str, str], pl.DataFrame]:
    """(stage, method) -> its lines of `means`, by stage, then in the order of the rows."""
    return means(rows).partition_by("stage", "method", as_dict=True, maintain_order=True)


def dense_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of uncompressed networks that have an accuracy."""
    ok = (pl.col("status") == "ok") & pl.col("acc").is_not_null() & pl.col("acc").is_not_nan()
    return rows.filter(ok & (pl.col("method") == DENSE))


def dense_accuracy(rows: pl.DataFrame) -> float | None:
    """Mean accuracy of the uncompressed network, 0 ... 1."""
    return dense_rows(rows)["acc"].mean()


def is_folding(labels: pl.Expr) -> pl.Expr:
    """Do these method labels name folding? Rows hold the label alone, so "fold" and "fold-writers" do, "mine" not."""
    return pl.any_horizontal(labels.str.starts_with(name) for name in sorted(FOLDING))


def is_mask(labels: pl.Expr) -> pl.Expr:
    """Do these method labels name masks, whose ratio is of weights and not of channels? By their beginnings, too."""
    return pl.any_horizontal(labels.str.starts_with(name) for name in sorted(MASKS))


def duels(rows: pl.DataFrame) -> pl.DataFrame:
    """One line per cell, stage and ratio: fold and prune, the best accuracies of each kind, and gap = fold - prune.

    0 ... 1; null where there is none of a kind. Give it the last measurement. Methods that were compensated on pictures
    ("fold+synthetic"), chosen ("auto") or compress some of the groups alone ("l1+filters") stay out of it, and masks:
    at one ratio they leave other networks.
    """
    return _duels(rows, "acc")


def _duels(rows: pl.DataFrame, value: str) -> pl.DataFrame:
    label = pl.col("method")
    rows = rows.filter(~label.str.contains("+", literal=True) & ~is_mask(label) & (label != AUTO))
    folding = is_folding(label)
    best = [pl.col(value).filter(kind).max().alias(name) for name, kind in (("fold", folding), ("prune", ~folding))]
    found = measured(rows).group_by(PER_CELL, maintain_order=True).agg(best)
    return found.with_columns(gap=pl.col("fold") - pl.col("prune"))


def gaps(rows: pl.DataFrame) -> pl.DataFrame:
    """One line per stage and ratio: n cells that have both kinds, the mean gap over them, its margin, and wins.

    gap: best folding minus best pruning, 0 ... 1; margin: half of its 95% interval (Student's t over cells), null when
    n < 3; wins: fraction of the cells in which folding is strictly better
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
    """How well `fidelity`, which sees no data, ranks raw results: Spearman's correlations, and over how many of them.

    acc: of fidelity with accuracy, over all networks, methods and ratios; gap: of the best folding's fidelity less the
    best pruning's with the gap of their accuracies, over networks and ratios
    sign: in what fraction of the gaps of more than SURE points either way it names the winner
    """

    acc: float
    n: int
    gap: float
    gaps: int
    sign: float
    sure: int


def foretold(rows: pl.DataFrame) -> Foretold | None:
    """Of the last measurement; None where fewer than three results have a fidelity."""
    known = pl.col("fidelity").is_not_null() & pl.col("fidelity").is_not_nan()
    found = measured(rows).filter(known & (pl.col("stage") == "raw"))
    if len(found) < 3:
        return None
    gap = (
        duels(found)
        .join(_duels(found, "fidelity"), on=PER_CELL, suffix="_foretold")
        .drop_nulls(["gap", "gap_foretold"])
    )
    sure = gap.filter(pl.col("gap").abs() > SURE)
    right = (sure["gap"].sign() == sure["gap_foretold"].sign()).mean() if len(sure) else math.nan
    return Foretold(
        float(spearmanr(found["fidelity"], found["acc"]).statistic),
        len(found),
        float(spearmanr(gap["gap_foretold"], gap["gap"]).statistic) if len(gap) > 2 else math.nan,
        len(gap),
        right,
        len(sure),
    )


def headlines(rows: pl.DataFrame) -> pl.DataFrame:
    """One line per cell: split and epoch of its last measurement, dense accuracy, and a duel: stage, ratio, fold, ...

    The duel is that of the repaired stage (else raw) at the ratio that was measured nearest 0.5. Null where unknown.
    """
    last = last_measurement(rows)
    rank = pl.col("stage").replace_strict({s: i for i, s in enumerate(HEADLINE_STAGES)}, return_dtype=pl.Int64)
    # rounded: 0.4 and 0.6 are equally near, whatever their last bits
    nearness = (pl.col("ratio") - HEADLINE_RATIO).abs().round(9)
    duel = duels(last).sort(rank, nearness, "ratio").unique("cell", keep="first", maintain_order=True)
    dense = dense_rows(last).group_by("cell").agg(dense=pl.col("acc").mean())
    lines = last.group_by("cell", maintain_order=True).agg(pl.col("split", "epoch").first())
    return lines.join(dense, on="cell", how="left").join(duel, on="cell", how="left")


def parameters_left(rows: pl.DataFrame) -> dict[float, float]:
    """ratio -> fraction of the parameters that stay, mean over what was measured."""
    dense = rows.filter(pl.col("method") == DENSE).group_by("cell").agg(dense=pl.col("params").max())
    kept = measured(rows).join(dense, on="cell").with_columns(kept=pl.col("params") / pl.col("dense"))
    kept = kept.group_by("ratio").agg(pl.col("kept").drop_nans().mean())
    return {ratio: left for ratio, left in kept.iter_rows() if left is not None}


def result_table(rows: pl.DataFrame, duel: bool = False) -> Table:
    """Methods x ratios, mean accuracy in %, the best method of each stage and ratio in bold; failed ones are marked.

    duel: below each stage, the gap of folding to pruning over the cells (`gaps`), in points
    """
    ratios = sorted(set(rows.filter(pl.col("method") != DENSE)["ratio"]))
    table = Table()
    table.add_column("ratio removed", no_wrap=True)
    for ratio in ratios:
        table.add_column(f"{ratio:g}", justify="right")
    masked = is_mask(pl.col("method"))
    for name, kind in {"parameters left": ~masked, "parameters not masked": masked}.items():
        left = parameters_left(rows.filter(kind | (pl.col("method") == DENSE)))
        if left:
            table.add_row(name, *(f"{left[r]:.0%}" if r in left else "-" for r in ratios))
    found = curves(rows)
    compared = gaps(rows) if duel else None
    for stage in dict.fromkeys(stage for stage, _ in found):
        table.add_section()
        table.add_row(f"[dim]{TITLES[stage]}[/]")
        lines = {method: line for (s, method), line in found.items() if s == stage}
        for method, cells in _accuracies(lines, ratios, rows["cell"].n_unique()).items():
            table.add_row(f"  {escape(method)}", *cells)
        if compared is not None:
            at = {line["ratio"]: line for line in compared.filter(pl.col("stage") == stage).iter_rows(named=True)}
            for name, show in DUEL_LINES.items():
                table.add_row(f"  [dim]{name}[/]", *(show(at[r]) if r in at else "-" for r in ratios))
    return table


def _accuracies(lines: dict[str, pl.DataFrame], ratios: list[float], cells: int) -> dict[str, list[str]]:
    """Label -> its accuracies as text; a method that fewer than all cells have says of how many the mean is."""
    by_ratio = {method: dict(line.select("ratio", "acc").iter_rows()) for method, line in lines.items()}
    best = {r: max(line.get(r, -1.0) for line in by_ratio.values()) for r in ratios}
    found = {}
    for method, line in by_ratio.items():
        texts = [f"{100 * line[r]:.1f}" if r in line else "failed" for r in ratios]
        low, high = lines[method]["n"].min(), lines[method]["n"].max()
        label = method if low >= cells else f"{method} (n {low}{f'-{high}' if high > low else ''})"
        found[label] = [f"[bold]{t}[/]" if line.get(r) == best[r] else t for r, t in zip(ratios, texts, strict=True)]
    return found


DUEL_LINES = {
    "gap, points": lambda at: f"{100 * at['gap']:+.1f}",
    "95% interval": lambda at: "-" if at["margin"] is None else f"±{100 * at['margin']:.1f}",
    "win rate": lambda at: f"{at['wins']:.0%}",
    "n cells": lambda at: f"{at['n']}",
}


def terminal() -> Console:
    """Where tables are printed. A pipe has no width of its own, and eleven columns do not fit into 80."""
    return Console(highlight=False, width=None if Console().is_terminal else 120)


def print_table(rows: pl.DataFrame, title: str, duel: bool = False) -> None:
    """The table of a run, or of several, on the terminal, and a line for each reason why something failed."""
    console = terminal()
    console.print(
        title, style="bold", markup=False, soft_wrap=True
    )  # of a table's own title, narrow tables make pieces
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
    largest = next((c for c in sorted(columns, key=lambda c: -c[1]) if c[0] != "onnx"), None)  # which hides its memory
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
    """A table for every model and kind of device, and a line for each reason why something has no times."""
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
    """Accuracy over ratio, one colour per method; one panel per stage, sharing the axes.

    Dotted: the uncompressed networks, of those that have rows of the stage (without BatchNorm nothing is repaired).
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    found = curves(rows)
    stages = list(dict.fromkeys(stage for stage, _ in found)) or ["raw"]
    methods = list(dict.fromkeys(method for _, method in found))
    masked = rows.select(is_mask(pl.col("method")).any()).item()
    figure = Figure(figsize=(1.5 + 4.5 * len(stages), 4.2), layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for panel, stage in zip(panels, stages, strict=True):
        has = rows.filter((pl.col("stage") == stage) & (pl.col("method") != DENSE))
        dense = dense_accuracy(rows.join(has.select("cell"), on="cell", how="semi") if len(has) else rows)
        for (s, method), line in found.items():
            if s != stage:
                continue
            ratios, accuracies = line["ratio"].to_list(), line["acc"].to_list()
            if dense is not None and 0.0 not in ratios:
                ratios, accuracies = [0.0, *ratios], [dense, *accuracies]
            percent = [100 * a for a in accuracies]
            panel.plot(ratios, percent, "o-", color=f"C{methods.index(method)}", label=method, markersize=4)
        if dense is not None:
            dotted = panel.axhline(100 * dense, color="grey", linestyle=":", label=f"dense {100 * dense:.1f}%")
            panel.legend(handles=[dotted], frameon=False, loc="upper right")
        panel.set_title(TITLES[stage], fontsize=10)
        panel.set_xlabel("fraction of channels removed" + ", of weights by masks" * masked)
        panel.set_ylim(0, 100)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
