"""Tables and pictures over rows."""

from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from pipeline.results import DENSE, STAGES

TITLES = {"raw": "raw (no data seen)", "repaired": "repaired (statistics re-estimated)", "norm_tuned": "norms tuned"}


def last_measurement(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of the test set if there are any, else those of validation, at the last epoch measured."""
    split = "test" if "test" in rows["split"] else "val"
    rows = rows.filter(pl.col("split") == split)
    return rows.filter(pl.col("epoch") == rows["epoch"].max())


def curves(rows: pl.DataFrame) -> dict[tuple[str, str], pl.DataFrame]:
    """(stage, method) -> ratio, acc (mean over what else differs), sorted by ratio; in the order of the rows."""
    ok = rows.filter((pl.col("status") == "ok") & (pl.col("method") != DENSE))
    mean = ok.group_by("stage", "method", "ratio", maintain_order=True).agg(pl.col("acc").mean())
    found = {key: part.sort("ratio") for key, part in mean.partition_by("stage", "method", as_dict=True).items()}
    return dict(sorted(found.items(), key=lambda item: STAGES.index(item[0][0])))


def dense_accuracy(rows: pl.DataFrame) -> float | None:
    """Mean accuracy of the uncompressed network, 0 ... 1."""
    return rows.filter((pl.col("method") == DENSE) & (pl.col("status") == "ok"))["acc"].mean()


def result_table(rows: pl.DataFrame, title: str) -> Table:
    """Methods x ratios, accuracy in %, the best method of each stage and ratio in bold; failed cells are marked."""
    ratios = sorted(set(rows.filter(pl.col("method") != DENSE)["ratio"]))
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("ratio removed")
    for ratio in ratios:
        table.add_column(f"{ratio:g}", justify="right")
    first = rows.filter((pl.col("status") == "ok") & (pl.col("method") != DENSE)).group_by("ratio").agg("params")
    params = {ratio: counts[0] for ratio, counts in first.iter_rows()}
    dense = rows.filter(pl.col("method") == DENSE)["params"].first()
    if dense:
        table.add_row("parameters left", *(f"{params[r] / dense:.0%}" if r in params else "-" for r in ratios))
    by_curve = {key: dict(part.select("ratio", "acc").iter_rows()) for key, part in curves(rows).items()}
    for stage in dict.fromkeys(stage for stage, _ in by_curve):
        table.add_section()
        table.add_row(f"[dim]{TITLES[stage]}[/]")
        lines = {method: line for (s, method), line in by_curve.items() if s == stage}
        best = {r: max(line.get(r, -1.0) for line in lines.values()) for r in ratios}
        for method, line in lines.items():
            cells = [f"{100 * line[r]:.1f}" if r in line else "failed" for r in ratios]
            marked = [f"[bold]{c}[/]" if line.get(r) == best[r] else c for r, c in zip(ratios, cells, strict=True)]
            table.add_row(f"  {method}", *marked)
    return table


def print_table(rows: pl.DataFrame, title: str) -> None:
    """The table of one run on the terminal, and a line for each reason why something failed."""
    # A pipe has no width of its own, and eleven columns do not fit into 80.
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(result_table(rows, title))
    failed = rows.filter(pl.col("status") == "failed").group_by("reason", maintain_order=True).len()
    for reason, count in failed.iter_rows():
        console.print(f"{count} measurements failed: {reason}", markup=False)


def plot_curves(rows: pl.DataFrame, path: str | Path, title: str) -> None:
    """Accuracy over ratio, one colour per method; one panel per stage, sharing the axes; the dense network dotted."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    found = curves(rows)
    stages = list(dict.fromkeys(stage for stage, _ in found)) or ["raw"]
    methods = list(dict.fromkeys(method for _, method in found))
    dense = dense_accuracy(rows)
    figure = Figure(figsize=(1.5 + 4.5 * len(stages), 4.2), layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for panel, stage in zip(panels, stages, strict=True):
        for (s, method), line in found.items():
            if s != stage:
                continue
            ratios, accuracies = line["ratio"].to_list(), line["acc"].to_list()
            if dense is not None and 0.0 not in ratios:
                ratios, accuracies = [0.0, *ratios], [dense, *accuracies]
            percent = [100 * a for a in accuracies]
            panel.plot(ratios, percent, "o-", color=f"C{methods.index(method)}", label=method, markersize=4)
        if dense is not None:
            panel.axhline(100 * dense, color="grey", linestyle=":", label=f"dense {100 * dense:.1f}%")
        panel.set_title(TITLES[stage], fontsize=10)
        panel.set_xlabel("fraction of channels removed")
        panel.set_ylim(0, 100)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
