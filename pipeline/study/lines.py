"""One line per cell, stage and ratio: its recipe beside what folding and pruning left, as statistics read it.

A recipe is everything that a cell was told but its seed, so that cells of one recipe are repetitions of each other.
"""

from dataclasses import dataclass
from functools import cached_property

import polars as pl

from pipeline.metrics import Metric
from pipeline.results import blind, headline, measured
from pipeline.study.summary import dense_rows, duels, last_measurement
from pipeline.study.sweep import Sweep, short, shown
from pipeline.tables import UserError

# Settings that tell repetitions of one recipe from each other; "named.": those that a checkpoint was trained with.
SEEDS = ("named.seed", "seed")
# Settings that change nothing that is measured, or that say of what the cells are, not how they were trained.
BESIDE = ("checkpoint", "compression", "device", "export", "launcher", "name", "profile", "trainer.devices")


def in_points(metric: Metric) -> pl.Expr:
    """A value of the metric on the scale where differences are taken: per cent, or 100 times the natural logarithm of
    a metric that is compared on a log axis, so that a point is then about one per cent."""
    value = pl.col(metric.name)
    return value.log() * 100 if metric.log else value * metric.scale


@dataclass(frozen=True)
class Lines:
    """The cells of a sweep as statistics read them.

    table: one line per cell, stage and ratio: cell, recipe (text), seed, stage, ratio, base (of the uncompressed
        network), fold, prune (the best of each side, see results.side), gap (by how much fold leads, positive where
        it is better), and a column for each of `settings`. Values are `in_points`; a ratio of null is the mean over the
        ratios from 0 to the largest one (the area under the curve).
    methods: one line per cell, stage, ratio and method: kind, value, params, macs.
    settings: columns that differ between cells, the seed left out. metric: the headline.
    blind: cells whose uncompressed network is no better than chance.
    """

    table: pl.DataFrame
    methods: pl.DataFrame
    settings: tuple[str, ...]
    metric: Metric
    blind: tuple[str, ...] = ()

    @cached_property
    def recipes(self) -> int:
        return self.table["recipe"].n_unique()

    def at(self, stage: str, ratio: float | None) -> pl.DataFrame:
        """The lines of one stage and ratio: one for each cell that has it."""
        return self.table.filter((pl.col("stage") == stage) & pl.col("ratio").eq_missing(ratio))


def lines(sweep: Sweep) -> Lines:
    """The lines of a sweep's cells that are done, at their last measurement. UserError where none has rows."""
    done = sweep.cells.filter(pl.col("state") == "done")
    rows = last_measurement(sweep.done_rows)
    if rows.is_empty():
        raise UserError("no cell that is done has rows yet; come back when one has")
    metric, unlearned = headline(rows), tuple(blind(rows)["cell"].unique(maintain_order=True))
    rows = rows.with_columns(in_points(metric))
    settings = told(sweep)
    cells = done.select(
        "cell",
        seed=pl.coalesce(*(name for name in SEEDS if name in done.columns), pl.lit(None, pl.Int64)),
        recipe=pl.concat_str([_told(done[full], name) for full, name in settings.items()], separator=", ")
        if settings
        else pl.lit(""),
        **{name: pl.col(full) for full, name in settings.items()},
    )
    dense = dense_rows(rows).group_by("cell").agg(base=pl.col(metric.name).mean())
    found = duels(rows).join(dense, on="cell", how="left", maintain_order="left")
    found = pl.concat([found, areas(found, metric.higher_is_better)], how="diagonal")
    beside = cells.join(found, on="cell", maintain_order="left")
    columns = ["cell", "stage", "ratio", "method", "kind", "statistics", "params", "macs"]
    methods = measured(rows, [*columns, metric.name]).rename({metric.name: "value"})
    methods = cells.select("cell", "recipe", "seed").join(methods, on="cell", maintain_order="left")
    return Lines(beside, methods, tuple(settings.values()), metric, unlearned)


def told(sweep: Sweep) -> dict[str, str]:
    """{full name: short name} of the settings that tell the recipes of a sweep apart."""
    return short([name for name in sweep.differing() if name not in SEEDS and not beside(name)])


def beside(name: str) -> bool:
    """Does a setting tell no recipes apart (see BESIDE)?"""
    own = name.removeprefix("named.")
    return any(own == setting or own.startswith(f"{setting}.") for setting in BESIDE)


def areas(found: pl.DataFrame, upward: bool) -> pl.DataFrame:
    """The mean over the ratios from 0 to the largest of each cell and stage (trapezoids), as lines of ratio null."""
    keys = ["cell", "stage"]
    start = found.select(*keys, "base", fold="base", prune="base").unique().with_columns(ratio=pl.lit(0.0))
    steps = pl.concat([start, found.select(*keys, "base", "fold", "prune", "ratio")], how="diagonal").sort("ratio")

    def area(name: str) -> pl.Expr:
        heights = (pl.col(name) + pl.col(name).shift()) / 2
        whole = (heights * pl.col("ratio").diff()).sum() / pl.col("ratio").max()
        return pl.when(pl.col(name).null_count() == 0).then(whole).alias(name)

    found = steps.group_by(keys, maintain_order=True).agg(pl.col("base").first(), area("fold"), area("prune"))
    lead = pl.col("fold") - pl.col("prune")
    return found.with_columns(ratio=pl.lit(None, pl.Float64), gap=lead if upward else -lead)


def _told(column: pl.Series, name: str) -> pl.Series:
    """ "lr=0.1" for each cell."""
    told = {value: f"{name}={shown(value)}" for value in column.unique()}
    return pl.Series(name, [told[value] for value in column], dtype=pl.String)
