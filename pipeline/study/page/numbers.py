"""Numbers on networks beside their settings: axes of the page, and what foldability is foretold from."""

import polars as pl

from pipeline.results import measured, side, valued
from pipeline.study.summary import PER_CELL, dense_rows
from pipeline.study.sweep import Sweep

# Columns of rows that are measured beside the metrics of a task, and what they are called.
MEASURED = {
    "sharpness_sam": "SAM sharpness",
    "sharpness_l2": "adaptive l2 sharpness",
    "sharpness_linf": "adaptive l-infinity sharpness",
    "hessian_top": "largest Hessian eigenvalue",
    "corrupted": "value on corrupted pictures",
}


def of_networks(sweep: Sweep, rows: pl.DataFrame) -> pl.DataFrame | None:
    """cell and a column for each number on the uncompressed networks that any cell has: those of MEASURED, features.

    rows: of the last measurement. None where there are none. Features are those of `Sweep.features`.
    """
    dense = dense_rows(rows)
    names = [name for name in MEASURED if name in dense.columns and dense[name].count()]
    found = dense.group_by("cell").agg(pl.col(names).mean())
    features = sweep.features
    if features is not None:
        taken = [name for name in features.columns if name != "cell" and name in found.columns]
        found = features.drop(taken).join(found, on="cell", how="left" if len(found) else "inner")
    return found if found.width > 1 else None


def of_folded(rows: pl.DataFrame, higher_is_better: bool) -> pl.DataFrame:
    """One line per cell, stage and ratio: MEASURED of the best folding, those alone that any line has."""
    names = [name for name in MEASURED if name in rows.columns and rows[name].count()]
    if not names:
        return rows.clear().select(PER_CELL)
    folded = measured(rows).with_columns(side=side(), of_side=valued(rows)).filter(pl.col("side") == "fold")
    best = folded.sort("of_side", descending=higher_is_better).unique(PER_CELL, keep="first", maintain_order=True)
    return best.select(*PER_CELL, *(name for name in names if best[name].count()))
