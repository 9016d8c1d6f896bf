"""Tables on the terminal."""

import math
from collections.abc import Sequence
from typing import Any

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.metrics import Metric
from pipeline.results import DENSE, headline
from pipeline.study.compare import SIDES, Comparison, sentence
from pipeline.study.summary import curves, gaps, headlines, parameters_left, speed_lines, with_pairs
from pipeline.study.words import around, signed

TITLES = {
    "raw": "raw (as compressed)",
    "repaired": "repaired (statistics re-estimated)",
    "norm_tuned": "norms tuned",
    "tuned": "repaired, then tuned",
}

WIDE = 0.1  # fraction by which a speedup may be off and be told without a warning
MOST_LEVELS = 4  # of a setting that are named one by one


def result_table(rows: pl.DataFrame, duel: bool = False, recipes: pl.DataFrame | None = None) -> Table:
    """Methods x ratios, mean headline, the best method of each stage and ratio in bold; failed ones are marked.

    duel: add below each stage the gap of folding to pruning, in points; recipes: see `gaps`
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
    compared = gaps(rows, recipes) if duel else None
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
    "win rate": lambda at, metric: "-" if at["margin"] is None else f"{at['wins']:.0%}",
    "n recipes": lambda at, metric: f"{at['n']}",
}


def terminal() -> Console:
    """The console for tables. A pipe has no width of its own, and eleven columns do not fit into 80 characters."""
    return Console(highlight=False, width=None if Console().is_terminal else 120)


def print_table(rows: pl.DataFrame, title: str, duel: bool = False, recipes: pl.DataFrame | None = None) -> None:
    """The table of a run, or of several, on the terminal, and a line for each reason why something failed."""
    console = terminal()
    console.print(
        title, style="bold", markup=False, soft_wrap=True
    )  # not the table's own title, which a narrow table breaks into pieces
    console.print(result_table(rows, duel, recipes))
    failed = rows.filter(pl.col("status") == "failed").group_by("reason", maintain_order=True).len()
    for reason, count in failed.iter_rows():
        console.print(f"{count} measurements failed: {reason}", markup=False, soft_wrap=True)


def verdict(rows: pl.DataFrame) -> str:
    """What one network says about folding and pruning, at its headline; "" where it has not both."""
    at = next(headlines(rows).drop_nulls(["fold", "prune"]).iter_rows(named=True), None)
    if at is None:
        return ""
    metric = headline(rows)
    fold, prune = metric.text(at["fold"]), metric.text(at["prune"])
    place = f"At ratio {at['ratio']:g}, {at['stage']}"
    if fold == prune:
        return f"{place}, folding and the best pruning both leave {fold} (one network)."
    lead = "better" if at["gap"] > 0 else "worse"
    difference = points(abs(at["gap"]), metric).lstrip("+") + (" points" if metric.unit == "%" else "")
    return f"{place}, folding leaves {fold} and the best pruning {prune}: {difference} {lead} (one network)."


def comparison_table(found: Comparison) -> Table:
    """A, B, their difference in points and its interval, for every method, stage and ratio; n where pairs lack some."""
    lines = found.table.filter(pl.col("method") != DENSE)
    ratios = lines["ratio"].unique().sort().to_list()
    shows = dict(COMPARED)
    if lines["n"].n_unique() == 1:
        shows.pop("[dim]pairs[/]")
    table = Table()
    table.add_column("ratio removed", no_wrap=True)
    for ratio in ratios:
        table.add_column(f"{ratio:g}", justify="right")
    for (stage,), of_stage in lines.group_by("stage", maintain_order=True):
        table.add_section()
        table.add_row(f"[dim]{escape(TITLES.get(stage, stage))}[/]")
        for (method,), of in of_stage.group_by("method", maintain_order=True):
            at = {line["ratio"]: line for line in of.iter_rows(named=True)}
            for name, show in shows.items():
                texts = (show(at[r], found.metric) if r in at else "-" for r in ratios)
                table.add_row(f"  {name.format(escape(method))}", *texts)
    return table


def in_units(value: float, metric: Metric) -> str:
    """A value that is in points (see lines.in_points) as the metric is read."""
    return metric.number(math.exp(value / 100)) if metric.log else f"{value:.{metric.digits}f}"


COMPARED = {
    "{}, A": lambda at, metric: in_units(at["a"], metric),
    "{}, B": lambda at, metric: in_units(at["b"], metric),
    "[bold]B less A[/]": lambda at, metric: signed(at["difference"], None, metric, bare=True),
    "[dim]95% interval[/]": lambda at, metric: (
        "-" if at["half"] is None else around(at["difference"], at["half"], metric)
    ),
    "[dim]pairs[/]": lambda at, metric: f"{at['n']}",
}


def print_comparison(found: Comparison, names: Sequence[str]) -> None:
    """Which two are compared and by what they differ, the table, and whether the one leaves more than the other."""
    console = terminal()
    for side, name, cells, alone in zip(SIDES, names, found.cells, found.alone, strict=True):
        left = f", {alone} without a partner" if alone else ""
        console.print(f"{side}  {name}: {cells} network{'s' * (cells != 1)}{left}", markup=False, soft_wrap=True)
    for name, levels in found.differing.items():
        told = " and ".join(f"{several(of)} in {side}" for side, of in zip(SIDES, levels, strict=True))
        console.print(f"   {name}: {told}", markup=False, soft_wrap=True)
    title = f"{found.metric.heading} over pairs of {found.unit}s"
    if (n := found.table["n"].unique()).len() == 1:
        title = f"{found.metric.heading} over {n[0]} pair{'s' * (n[0] != 1)} of {found.unit}s"
    for line in found.table.filter(pl.col("method") == DENSE).iter_rows(named=True):
        a, b = (in_units(line[side.lower()], found.metric) for side in SIDES)
        title += f"; uncompressed {a} in A, {b} in B"
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(comparison_table(found))
    console.print(sentence(found), markup=False)


def several(levels: Sequence[str]) -> str:
    """ "0.01 or 0.1"; a count where there are more than anybody reads."""
    return " or ".join(levels) if len(levels) <= MOST_LEVELS else f"{len(levels)} values"


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
    """ "5.31 of 12.7 ms (2.4x)": the time of a pass, and that of the uncompressed network in the same turns."""
    if line is None or line["median"] is None:
        return "-"
    faster = "" if line["speedup"] is None else f" ({line['speedup']:.1f}x)"
    beside = "" if line.get("beside") is None else f" of {milliseconds(line['beside'])}"
    return f"{milliseconds(line['median'])}{beside} ms{faster}"


def milliseconds(seconds: float) -> str:
    """ "5.31", "1,234" """
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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
        print_doubts(of)


def print_doubts(times: pl.DataFrame) -> None:
    """A line for each reason why times are missing, and one where times beside each other scatter too much."""
    console = terminal()
    failed = times.filter(pl.col("reason") != "").group_by("runtime", "reason", maintain_order=True).len()
    for runtime, reason, count in failed.iter_rows():
        console.print(f"{count} times of {runtime} are missing: {reason}", markup=False, soft_wrap=True)
    paired = with_pairs(times).fill_nan(None).drop_nulls("doubt")
    if (wide := paired.filter(pl.col("doubt") > WIDE)).is_empty():
        return
    worst = wide.row(wide["doubt"].arg_max(), named=True)
    text = f"warning: {len(wide)} of {len(paired)} speedups may be off by more than {WIDE:.0%} (the worst, "
    text += f"{worst['runtime']} at batch {worst['batch_size']}: {worst['speedup']:.1f}x, by {worst['doubt']:.0%})"
    fix = "time them on an idle machine, or longer with profile.seconds="
    console.print(f"{text}: passes that followed each other differ; {fix}", markup=False, soft_wrap=True)
