"""What a run logs of its rows: the names of the numbers, and the numbers.

Loggers, monitors and dashboards read these names here, so that none of them spells one by itself. "compress" stands for
the validation samples; other samples follow it, as in "compress_test" and "compress_val1".
"""

import math
import re
from collections.abc import Iterator, Sequence

import polars as pl

from pipeline.metrics import METRICS
from pipeline.results import DENSE, Row, foldability, headline, side, table
from pipeline.study.summary import curves, dense_value, duels

ROWS_TABLE = "compress/rows"
RATIO = "ratio"  # the axis of curves
GAP, FOLDING, PRUNING = "gap", "folding", "pruning"  # beside methods: folding's lead, the best of each side


def place(part: str, split: str) -> str:
    """("compress", "val") -> "compress"; ("compress", "test") -> "compress_test"; "val/1" -> "compress_val1"."""
    return part if split == "val" else f"{part}_{re.sub('/', '', split)}"


def dense_name(metric: str, split: str = "val") -> str:
    """The headline of the uncompressed network."""
    return f"{place('compress', split)}/{DENSE}/{metric}"


def point_name(method: str, ratio: float, metric: str, stage: str, split: str = "val") -> str:
    """The headline of one smaller network."""
    return f"{place('compress', split)}/{method}/r{ratio:g}/{metric}_{stage}"


def area_name(of: str, stage: str, split: str = "val") -> str:
    """The area under the curve over the ratio. of: a method, FOLDING, PRUNING, or GAP."""
    return f"{place('foldability', split)}/{of}_{stage}"


def curve_name(of: str, metric: str, stage: str, split: str = "val") -> str:
    """The headline as a curve over `ratio_name`. of: a method or GAP."""
    return f"{place('curve', split)}/{of}/{metric}_{stage}"


def ratio_name(split: str = "val") -> str:
    return f"{place('curve', split)}/{RATIO}"


def table_name(method: str, split: str = "val") -> str:
    """The table of one method: a line for each ratio, a column for each stage."""
    return f"{place('tables', split)}/{method}"


def epoch_numbers(rows: Sequence[Row]) -> dict[str, float]:
    """{name: number} that an epoch logs: the headline metric of every row, the areas, and the gaps."""
    logged: dict[str, float] = {}
    for split in dict.fromkeys(row.split for row in rows):
        logged |= _numbers_of_split([row for row in rows if row.split == split], split)
    return logged


def _numbers_of_split(rows: Sequence[Row], split: str) -> dict[str, float]:
    metric = METRICS[str(rows[0].metric)]
    logged: dict[str, float] = {}
    found: dict[tuple[str, str], dict[float, float]] = {}
    sides = {(stage, method): of for stage, method, of in table(rows).select("stage", "method", side()).iter_rows()}
    dense = math.nan
    for row in rows:
        value = math.nan if (known := getattr(row, metric.name)) is None else known
        if row.method == DENSE:
            dense = logged[dense_name(metric.name, split)] = value
        else:
            logged[point_name(row.method, row.ratio, metric.name, row.stage, split)] = value
            found.setdefault((row.stage, row.method), {})[row.ratio] = value
    best = max if metric.higher_is_better else min
    for stage in dict.fromkeys(stage for stage, _ in found):
        areas = {method: foldability(dense, curve, metric) for (s, method), curve in found.items() if s == stage}
        of_side = {
            name: [area for method, area in areas.items() if sides[stage, method] == of]
            for name, of in {FOLDING: "fold", PRUNING: "prune"}.items()
        }
        leaders = {name: best(values) for name, values in of_side.items() if values}
        if len(leaders) == 2:
            lead = leaders[FOLDING] - leaders[PRUNING]
            leaders[GAP] = lead if metric.higher_is_better else -lead
        logged |= {area_name(of, stage, split): area for of, area in (areas | leaders).items()}
    return logged


def curve_numbers(rows: pl.DataFrame) -> list[dict[str, float]]:
    """One {name: number} for each split and ratio, in order, for plots over the ratio: of each split's last epoch.

    Ratio 0 is the uncompressed network. Failed rows have no number.
    """
    return [numbers for split, part in last_of_splits(rows) for numbers in _curve_of_split(part, split)]


def last_of_splits(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """(split, the rows of its last epoch) for every split."""
    last = rows.filter(pl.col("epoch") == pl.col("epoch").max().over("split"))
    for (split,), part in last.partition_by("split", as_dict=True, maintain_order=True).items():
        yield str(split), part


def _curve_of_split(rows: pl.DataFrame, split: str) -> list[dict[str, float]]:
    metric, dense = headline(rows).name, dense_value(rows)
    by_ratio: dict[float, dict[str, float]] = {}
    for (stage, method), line in curves(rows).items():
        name = curve_name(method, metric, stage, split)
        if dense is not None:
            by_ratio.setdefault(0.0, {})[name] = dense
        for ratio, value in line.select("ratio", "value").iter_rows():
            by_ratio.setdefault(ratio, {})[name] = value
    for stage, ratio, gap in duels(rows).drop_nulls("gap").select("stage", "ratio", "gap").iter_rows():
        name = curve_name(GAP, metric, stage, split)
        by_ratio.setdefault(0.0, {}).setdefault(name, 0.0)
        by_ratio[ratio][name] = gap
    return [{ratio_name(split): ratio, **numbers} for ratio, numbers in sorted(by_ratio.items())]


def method_tables(rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """{table_name: one line for each ratio, with params, macs and the headline after each stage}, of last epochs."""
    found: dict[str, pl.DataFrame] = {}
    for split, part in last_of_splits(rows):
        metric = headline(part)
        for (method,), of in part.filter(pl.col("method") != DENSE).partition_by("method", as_dict=True).items():
            values = of.pivot("stage", index="ratio", values=metric.name, aggregate_function="first")
            sizes = of.group_by("ratio").agg(pl.col("params", "macs").first())
            lines = sizes.join(values, on="ratio").sort("ratio")
            found[table_name(str(method), split)] = lines.rename(
                {stage: f"{metric.name}_{stage}" for stage in values.columns if stage != "ratio"}
            )
    return found
