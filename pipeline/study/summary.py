"""Numbers over rows: of one run, or over the cells of a sweep."""

import math
from typing import NamedTuple

import polars as pl
from scipy.stats import spearmanr

from pipeline.results import DENSE, headline, means, measured, side, valued
from pipeline.study.intervals import shown_half

HEADLINE_STAGES = ("repaired", "raw", "norm_tuned", "tuned")  # the first of them that a cell has is its headline
HEADLINE_RATIO = 0.5
SURE = 0.02  # a smaller gap is within the noise of some thousand pictures
PER_CELL = ["cell", "stage", "ratio"]


def last_measurement(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of each cell's last measured epoch: those of the test set if there are any, else of validation."""
    # Windows take a fifth of the memory of a join with each cell's last epoch.
    test, val = (pl.col("epoch").filter(pl.col("split") == split).max().over("cell") for split in ("test", "val"))
    split = pl.when(test.is_not_null()).then(pl.lit("test")).otherwise(pl.lit("val"))
    last = (pl.col("split") == split) & (pl.col("epoch") == pl.coalesce(test, val))
    kept = rows.select(last.fill_null(False)).to_series()
    return rows if kept.all() else rows.filter(kept)  # spare a copy of all rows


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
    found = measured(rows, [*PER_CELL, *side().meta.root_names(), *value.meta.root_names()])
    found = found.with_columns(side=side(), of_side=value)
    best = pl.col("of_side").max() if upward else pl.col("of_side").min()
    found = found.filter(pl.col("side").is_not_null()).group_by(*PER_CELL, "side", maintain_order=True).agg(best)
    found = found.pivot("side", index=PER_CELL, values="of_side")
    missing = [pl.lit(None, pl.Float64).alias(name) for name in ("fold", "prune") if name not in found.columns]
    found = found.with_columns(missing).select(*PER_CELL, "fold", "prune")
    gap = pl.col("fold") - pl.col("prune")
    return found.with_columns(gap=gap if upward else -gap)


def gaps(rows: pl.DataFrame, recipes: pl.DataFrame | None = None) -> pl.DataFrame:
    """One line per stage and ratio: n recipes that have both sides, the mean gap over them, its margin, and wins.

    gap: by how much the best folding leads the best pruning; margin: half of its 95% interval (Student's t over
    recipes), null when n < 3; wins: fraction of the recipes in which folding is strictly better

    recipes: cell, recipe; the seeds of a recipe are averaged first. Without it each cell is a recipe of its own.
    """
    gap, found = pl.col("gap"), duels(rows).drop_nulls("gap")
    if recipes is not None:
        found = found.join(recipes.select("cell", "recipe"), on="cell", how="left", maintain_order="left")
        found = found.group_by("recipe", "stage", "ratio", maintain_order=True).agg(gap.mean())
    found = found.group_by("stage", "ratio", maintain_order=True)
    found = found.agg(gap.mean(), n=pl.len(), std=gap.std(), wins=(gap > 0).mean())
    margins = [shown_half(std, n) for std, n in found["std", "n"].iter_rows()]
    return found.with_columns(margin=pl.Series(margins, dtype=pl.Float64)).drop("std")


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


def speed_lines(speeds: pl.DataFrame) -> pl.DataFrame:
    """One line per (ratio, method, params, runtime, batch_size): medians over the cells of `read_speeds`.

    median: seconds; speedup: over the uncompressed network, timed beside it, and beside: its seconds; macs: of one
    sample; size, memory: bytes
    """
    values = ["median", "speedup", "beside", "macs", "size", "memory"]
    keys = ["ratio", "method", "params", "runtime", "batch_size"]
    lines = with_pairs(speeds).fill_nan(None).group_by(keys, maintain_order=True).agg(pl.col(values).median())
    return lines.sort("ratio", maintain_order=True)


def with_pairs(speeds: pl.DataFrame) -> pl.DataFrame:
    """The speeds; those of older files, which lack `beside` and `doubt`, have null there."""
    missing = [name for name in ("beside", "doubt") if name not in speeds.columns]
    return speeds.with_columns(pl.lit(None, pl.Float64).alias(name) for name in missing)
