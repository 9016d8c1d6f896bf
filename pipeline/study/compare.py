"""Two runs or two sweeps beside each other: what the same compression leaves of each, over matched networks.

Networks are matched where they agree in every setting but those in which no network of the one side is like any of the
other: these settings are what is compared. Pairs are of recipes, seeds averaged, as for all effects. Where both sides
share one recipe alone its networks are matched by seed and checkpoint, and an interval then speaks of seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.cells import RECORD, as_table, line
from pipeline.metrics import Metric
from pipeline.results import DENSE, ROWS, headline, measured, read_present
from pipeline.study.claims import FEWEST
from pipeline.study.intervals import shown_half
from pipeline.study.lines import SEEDS, beside, in_points
from pipeline.study.matching import ABSENT, coded_levels
from pipeline.study.summary import HEADLINE_RATIO, HEADLINE_STAGES, dense_rows, last_measurement
from pipeline.study.sweep import COLUMNS, Sweep, load, short, shown
from pipeline.study.words import change, place, signed
from pipeline.tables import UserError
from pipeline.vocabulary import TAILS

SIDES = ("A", "B")
PLACE = ["method", "stage", "ratio"]  # what has to be alike for two rows to be compared
ONE_EACH = {"task": "task", "data": "data set", "split": "split", "model": "model"}  # no mean is over two of these
SAME = ("task", "data", "split")  # and no difference either
READ = (*COLUMNS, "task", "seed", "n")
# Settings of a compression that choose which rows there are, and change none.
CHOOSING = [
    f"compression.{name}" for name in "methods ratios stages save every_n_epochs predict sharpness corruptions".split()
]


@dataclass(frozen=True)
class Comparison:
    """B less A.

    table: one line per method, stage and ratio that both have, uncompressed networks first: kind, a and b (means over
        the pairs), difference, half (of its 95% interval, Student's t; null below three pairs), in points (see
        lines.in_points), and n pairs
    metric: the headline; unit: "recipe" or "network", of which the pairs are
    differing: {setting: (its levels in A, in B)} where these are not the same, as texts
    cells, alone: networks of A and of B, and how many of these have no partner
    """

    table: pl.DataFrame
    metric: Metric
    unit: str
    differing: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    cells: tuple[int, int]
    alone: tuple[int, int]


def load_side(path: Path, warn: Callable[[str], None]) -> Sweep:
    """The cells of a run's own folder or of its rows.parquet, else of what `load` takes."""
    folder = path.parent if path.name == ROWS else path
    if (folder / RECORD).is_file() and (record := line(folder)) is not None:
        return Sweep(as_table([record]), read_present([folder / ROWS], READ, warn))
    return load(path, READ, warn)


def compare(sweeps: Sequence[Sweep], names: Sequence[str]) -> Comparison:
    """What B leaves beside A, two sweeps. names: of both, for errors. UserError where they cannot be compared."""
    rows = [done_rows(sweep, name) for sweep, name in zip(sweeps, names, strict=True)]
    metric = comparable(rows, names)
    cells = networks(sweeps, rows)
    if not all(sweep.settings for sweep in sweeps):
        check_bare(cells, names)
    levels = {name: levels_of(cells, name) for name in cells.columns if name not in ("side", "cell", "seed")}
    common = [name for name, (a, b) in levels.items() if set(a) & set(b)]
    matching = [name for name in common if name != "checkpoint" and cells[name].n_unique() > 1]
    units = {"recipe": matching, "network": [*matching, "seed", *(n for n in common if n == "checkpoint")]}
    cells = cells.select("side", "cell", *(_told(names).alias(unit) for unit, names in units.items()))
    values = in_both(rows, metric, names).join(cells, on=["side", "cell"], maintain_order="left")
    unit, pairs = paired(values)
    if pairs.is_empty():
        told = ", ".join(short(matching).values())
        text = f"no recipe of {names[0]} is one of {names[1]} in all of these: {told}"
        raise UserError(f"{text}; keep values that both have with --where SETTING=VALUE")
    differing = {name: both for name, both in levels.items() if set(both[0]) != set(both[1])}
    return Comparison(
        differences(pairs),
        metric,
        unit,
        {label: differing[name] for name, label in short(list(differing)).items()},
        counted(values),
        counted(values.join(pairs, on=unit, how="anti")),
    )


def done_rows(sweep: Sweep, name: str) -> pl.DataFrame:
    """The rows of the last measurement of the cells that are done. UserError where there are none."""
    done = sweep.cells.filter(pl.col("state") == "done").select("cell")
    rows = last_measurement(sweep.rows.join(done, on="cell", how="semi", maintain_order="left"))
    if rows.is_empty():
        raise UserError(f"no cell of {name} that is done has rows yet; come back when one has")
    return rows


def comparable(rows: Sequence[pl.DataFrame], names: Sequence[str]) -> Metric:
    """The headline of both sides. UserError where a side has two of ONE_EACH, or where the sides differ in SAME."""
    metrics = [headline(own) for own in rows]
    if metrics[0] != metrics[1]:
        told = " and ".join(f"{name} by {metric.title}" for name, metric in zip(names, metrics, strict=True))
        raise UserError(f"{told}: two headlines have no difference; give two that are measured alike")
    for column, what in ONE_EACH.items():
        found = [own[column].drop_nulls().unique().sort().to_list() for own in rows]
        for name, values in zip(names, found, strict=True):
            if len(values) > 1:
                raise UserError(f"{name} has more than one {what}: {', '.join(values)}; keep one with --where")
        if column in SAME and found[0] != found[1]:
            told = " and ".join(f"{name} ({', '.join(of)})" for name, of in zip(names, found, strict=True))
            raise UserError(f"{told} were not measured on one {what}; give two that were")
    return metrics[0]


def networks(sweeps: Sequence[Sweep], rows: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """One line per network of both sides: side, cell, seed, checkpoint and each setting of its recipe, as texts.

    A file of bare rows knows no settings; the model alone is then told.
    """
    known = all(sweep.settings for sweep in sweeps)
    parts = []
    for side, sweep, own in zip(SIDES, sweeps, rows, strict=True):
        of_rows = own.select("cell", pl.col("seed").alias(" seed"), pl.col("model").alias(" model"))
        cells = of_rows.unique("cell", maintain_order=True).join(sweep.cells, on="cell", maintain_order="left")
        seed = next((name for name in SEEDS if name.startswith("named.") and name in cells.columns), " seed")
        taken = {"cell": "cell", "seed": seed}
        taken |= {name: name for name in sweep.settings if known and (in_recipe(name) or name == "checkpoint")}
        taken |= {} if known else {"model": " model"}
        texts = {name: pl.Series([shown(value) for value in cells[of]], dtype=pl.String) for name, of in taken.items()}
        parts.append(pl.DataFrame({"side": [side] * len(cells), **texts}))
    return pl.concat(parts, how="diagonal").fill_null(ABSENT)


def check_bare(cells: pl.DataFrame, names: Sequence[str]) -> None:
    """UserError where recipes cannot be told apart, because the settings of a side are unknown."""
    for side, name in zip(SIDES, names, strict=True):
        seeds = cells.filter(pl.col("side") == side)["seed"]
        if seeds.n_unique() < len(seeds):
            text = f"{name} holds {len(seeds)} networks, and a file of rows without settings tells no recipes apart"
            raise UserError(f"{text}; name the folders of two runs, or files that report --out wrote")


def in_recipe(name: str) -> bool:
    """Can what a network leaves depend on this setting, beside its seed?"""
    own = name.removeprefix("named.")
    return name not in SEEDS and own not in CHOOSING and (own.startswith("compression.") or not beside(name))


def levels_of(cells: pl.DataFrame, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The levels of a setting in A and in B."""
    a, b = (coded_levels(cells.filter(pl.col("side") == side)[name])[1] for side in SIDES)
    return a, b


def _told(names: Sequence[str]) -> pl.Expr:
    return pl.concat_str(names, separator=", ") if names else pl.lit("")


def in_both(rows: Sequence[pl.DataFrame], metric: Metric, names: Sequence[str]) -> pl.DataFrame:
    """side, cell, PLACE, kind and value (in points) of every row whose PLACE both sides have. UserError for none.

    A value that is not finite has no difference and is left out, as a failed row is.
    """
    parts = []
    for side, own in zip(SIDES, rows, strict=True):
        found = pl.concat([dense_rows(own), measured(own)])
        found = found.select(pl.lit(side).alias("side"), "cell", *PLACE, "kind", value=in_points(metric))
        parts.append(found.filter(pl.col("value").is_finite()).with_columns(pl.col("ratio").round(9)))
    a, b = (part.join(other, on=PLACE, how="semi") for part, other in zip(parts, parts[::-1], strict=True))
    if (a["method"] == DENSE).all():
        told = " and ".join(f"{name} {_methods(part)}" for name, part in zip(names, parts, strict=True))
        raise UserError(f"no method, stage and ratio is in both: {told}; measure both by the same ones")
    return pl.concat([a, b])


def _methods(part: pl.DataFrame) -> str:
    """ "has fold, l1 (raw)" """
    found = part.filter(pl.col("method") != DENSE)
    methods, stages = (", ".join(found[name].unique(maintain_order=True)) for name in ("method", "stage"))
    return f"has {methods} ({stages})" if methods else "has none"


def paired(values: pl.DataFrame) -> tuple[str, pl.DataFrame]:
    """(unit, pairs): PLACE, kind, the unit, a and b. Networks are the unit where both sides share one recipe alone."""
    recipes = _paired(values, "recipe")
    if recipes["recipe"].n_unique() == 1:
        alike = values.join(recipes, on="recipe", how="semi", maintain_order="left")
        if len(found := _paired(alike, "network")):
            return "network", found
    return "recipe", recipes


def _paired(values: pl.DataFrame, unit: str) -> pl.DataFrame:
    means = values.group_by(*PLACE, unit, "side", maintain_order=True).agg(
        pl.col("kind").first(), pl.col("value").mean()
    )
    a, b = (means.filter(pl.col("side") == side).drop("side") for side in SIDES)
    found = a.rename({"value": "a"}).join(
        b.rename({"value": "b"}).drop("kind"), on=[*PLACE, unit], maintain_order="left"
    )
    return found


def differences(pairs: pl.DataFrame) -> pl.DataFrame:
    """The table of a Comparison."""
    difference = pl.col("b") - pl.col("a")
    found = pairs.group_by(*PLACE, maintain_order=True).agg(
        pl.col("kind").first(), pl.col("a", "b").mean(), difference=difference.mean(), sd=difference.std(), n=pl.len()
    )
    halves = [shown_half(sd, n) for sd, n in found["sd", "n"].iter_rows()]
    methods = found.select("method").unique(maintain_order=True).with_row_index("order")
    stages = {stage: i for i, stage in enumerate(TAILS)}
    stage = pl.col("stage").replace_strict(stages, default=len(stages), return_dtype=pl.Int64)
    found = found.with_columns(half=pl.Series(halves, dtype=pl.Float64)).drop("sd")
    found = found.join(methods, on="method", maintain_order="left")
    return found.sort(pl.col("method") != DENSE, stage, "order", "ratio").drop("order")


def counted(values: pl.DataFrame) -> tuple[int, int]:
    """Networks of A and of B."""
    a, b = (values.filter(pl.col("side") == side)["cell"].n_unique() for side in SIDES)
    return a, b


def leading(found: Comparison) -> dict[str, Any]:
    """The line that a verdict is about: folding where it is there, at the stage and ratio that lead."""
    lines = found.table.filter(pl.col("method") != DENSE)
    there = lines["stage"].unique(maintain_order=True).to_list()
    stage = next(name for name in (*HEADLINE_STAGES, *there) if name in there)
    folds = pl.when(pl.col("method") == "fold").then(0).when(pl.col("kind").is_in(["fold", "mix"])).then(1).otherwise(2)
    # Rounded, so that 0.4 and 0.6 are equally near, whatever their last bits.
    nearness = (pl.col("ratio") - HEADLINE_RATIO).abs().round(9)
    lines = lines.filter(pl.col("stage") == stage)
    return lines.sort(nearness, "ratio", folds, maintain_order=True).row(0, named=True)


def sentence(found: Comparison) -> str:
    """Whether B leaves more than A, at one place; an assertion needs as many pairs as one of `claims`."""
    at, metric = leading(found), found.metric
    what = f"the {metric.title} that {at['method']} leaves {place(at['stage'], at['ratio'])}".removesuffix(",")
    dense = found.table.filter(pl.col("method") == DENSE).to_dicts()
    told = f"{at['n']:,} pair{'s' * (at['n'] != 1)} of {found.unit}s"
    told += "".join(f"; uncompressed {signed(d['difference'], d['half'], metric, bare=True)}" for d in dense[:1])
    by = signed(at["difference"], at["half"], metric)
    if at["n"] < FEWEST:
        return f"From A to B: n too small for a word on {what}: {by} ({told}; {FEWEST} pairs are the fewest)."
    if abs(at["difference"]) <= at["half"]:
        return f"From A to B there is no sure change of {what}: {by} ({told})."
    return f"B in place of A {change(at['difference'], what, at['half'], 'fold', metric)} ({told})."
