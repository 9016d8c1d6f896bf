"""Typed rows: one measurement each. Written whole or not at all, read as one table.

Knows neither Lightning nor W&B. A file holds the rows of one cell.
"""

import math
import os
import subprocess
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice, pairwise
from pathlib import Path

import polars as pl

from pipeline.metrics import METRICS, Metric
from pipeline.tables import UserError, first_line
from pipeline.vocabulary import TAILS, UNITS

DENSE = "dense"
BATCH = 250  # files parsed at a time
AHEAD = 2  # such batches that are read before they are parsed; all at once would hold every file in memory
ROWS = "rows.parquet"  # a cell's rows, in its folder
SPEED = "speed.parquet"  # beside the rows: size and speed of the cell's networks
# Rows of the cell's chains, which are no grid of methods and ratios, and times of their networks.
CHAIN_ROWS, CHAIN_SPEED = "chains.parquet", "chain_speed.parquet"


@dataclass(frozen=True)
class Row:
    """One measurement of one compressed (or, for method "dense", uncompressed) network.

    cell: the run that it belongs to; seed: of the run; epoch: finished epochs; step: optimizer steps by then
    method: as named by the user; ratio: fraction of channels removed (of weights, by masks), 0 <= r < 1
    stage: what came behind the compression, as named by the user: raw (nothing), repaired (BatchNorm statistics
        re-estimated on unlabelled training samples), norm_tuned (then norm parameters trained with labels), ...
    split, n: which samples the metrics were measured on, and how many
    acc ... bits_per_byte: the metrics of `pipeline.tasks.METRICS`; None where the task has others
    error: mean relative parameter error of the channel groups or masked weights
    params: parameters that are left; macs: multiply-accumulates per sample, where a masked weight counts as any other;
        seconds: to compress, repair and evaluate
    fidelity: foretold on synthetic pictures, before later stages: how alike the compressed and the dense network
        answer, 0 ... 1 (see compression.calibrate.predict); None: not asked for
    sharpness_sam, sharpness_l2, sharpness_linf, hessian_top: how fast the loss rises when weights move (see
        pipeline.sharpness), and corrupted: the headline metric on corrupted pictures (see pipeline.data.corruptions);
        None: not asked for
    status: ok or failed; reason: why it failed; version: of this code
    task, metric: what was measured, and which of the metrics is the headline; chance: the headline of answers that are
        drawn blindly, None where the task knows no such number and in rows of before 2026-11-29
    kind: what became of channels: fold, prune, mix, mask, auto; dense: nothing
    calibration: none, synthetic or data: the samples that the method looked at; sizes: uniform, or the budget; scope:
        the parts or units that were compressed
    statistics: what BatchNorm statistics were re-estimated on: none, weights, synthetic or data
    chain: every stage that the network went through, spelled out (see pipeline.stages.chain)
    bytes: of the network's file; unlabelled, labelled: training samples that its stages looked at, where one counts
        each time that it is trained on. None in rows that no run of chains measured
    """

    cell: str
    model: str
    data: str
    seed: int
    epoch: int
    step: int
    method: str
    ratio: float
    stage: str
    split: str
    status: str = "ok"
    reason: str = ""
    n: int = 0
    acc: float | None = None
    loss: float | None = None
    miou: float | None = None
    exact: float | None = None
    perplexity: float | None = None
    token_acc: float | None = None
    bits_per_byte: float | None = None
    error: float | None = None
    params: int | None = None
    macs: int | None = None
    seconds: float | None = None
    fidelity: float | None = None
    version: str = ""
    task: str | None = None
    metric: str | None = None
    kind: str | None = None
    calibration: str | None = None
    sizes: str | None = None
    scope: str | None = None
    statistics: str | None = None
    chain: str | None = None
    bytes: int | None = None
    unlabelled: int | None = None
    labelled: int | None = None
    sharpness_sam: float | None = None
    sharpness_l2: float | None = None
    sharpness_linf: float | None = None
    hessian_top: float | None = None
    corrupted: float | None = None
    chance: float | None = None


_POLARS = {str: pl.String, int: pl.Int64, float: pl.Float64}
SCHEMA = {
    f.name: next(dtype for python, dtype in _POLARS.items() if python.__name__ in str(f.type)) for f in fields(Row)
}
KEY = ["cell", "epoch", "method", "ratio", "stage", "split"]


def table(rows: Iterable[Row]) -> pl.DataFrame:
    """The rows as a typed table, one column per field."""
    return pl.DataFrame([asdict(row) for row in rows], schema=SCHEMA)


class RowStore:
    """The rows of one cell, in memory and, with a path, in a Parquet file that is replaced whole at every write.

    So a kill never leaves half a row, and rows that could not be written (disk full) go out with the next write.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.rows = read(self.path) if self.path is not None and self.path.exists() else table([])

    def truncate(self, epoch: int) -> None:
        """Forget rows of epochs later than `epoch`: a run that resumes there measures them again."""
        self.rows = self.rows.filter(pl.col("epoch") <= epoch)

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; a row with the same KEY is replaced."""
        self.rows = pl.concat([self.rows, table(rows)]).unique(KEY, keep="last", maintain_order=True)

    def write(self) -> None:
        """Bring the file up to date. Raises OSError when the disk refuses."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        try:
            self.rows.write_parquet(part)
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)


def read(*paths: str | Path) -> pl.DataFrame:
    """All rows of these files as one table. Raises OSError for an absent file, PolarsError for a damaged one."""
    return with_facts(_parsed([Path(path).read_bytes() for path in paths], list(SCHEMA))) if paths else table([])


def read_present(
    paths: Iterable[str | Path], columns: Sequence[str] = tuple(SCHEMA), warn: Callable[[str], None] = warnings.warn
) -> pl.DataFrame:
    """These columns of the files that exist; `warn` is told of every damaged file, and the others are read.

    Each file is read whole before it is parsed, so one that is replaced meanwhile gives its old or its new content. A
    thread of its own parses BATCH files at a time, because their footers cost most, while `paths` goes on.
    """
    paths, futures = iter(paths), []
    with ThreadPoolExecutor(1) as parser:
        while batch := list(islice(paths, BATCH)):
            found = {path: blob for path in batch if (blob := _blob(path, warn)) is not None}
            futures.append(parser.submit(_parsed_whole, found, list(columns), warn))
            if len(futures) > AHEAD:
                futures[-AHEAD].result()
    parts = [part for future in futures for part in future.result()]
    return with_facts(pl.concat([table([]).select(columns), *parts], rechunk=False))


def _blob(path: str | Path, warn: Callable[[str], None]) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):  # nothing measured yet, or the sweep is one file of rows
        return None
    except OSError as error:
        warn(f"{path} cannot be read ({first_line(error)})")
        return None


def _parsed(blobs: list[bytes], columns: list[str]) -> pl.DataFrame:
    # The in-memory engine: the streaming one takes half as long again on many small files.
    files = pl.scan_parquet(blobs, schema=SCHEMA, missing_columns="insert")
    # One chunk per file would make every later step ten times as slow; one chunk of all rows would need a second copy.
    return files.select(columns).collect(engine="in-memory").rechunk()


def _parsed_whole(
    blobs: dict[str | Path, bytes], columns: list[str], warn: Callable[[str], None]
) -> list[pl.DataFrame]:
    """The files of `blobs` parsed together; where that fails, one by one, without the damaged ones."""
    if not blobs:
        return []
    try:
        return [_parsed(list(blobs.values()), columns)]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        if len(blobs) == 1:
            warn(f"{next(iter(blobs))} is damaged or of another version ({first_line(error)})")
            return []
    return [part for path, blob in blobs.items() for part in _parsed_whole({path: blob}, columns, warn)]


def read_speeds(paths: Iterable[str | Path], warn: Callable[[str], None] = warnings.warn) -> pl.DataFrame:
    """The lines of those files that exist: cell, model, data, method, ratio, device, threads, and fields of Profile.

    `warn` is told of every damaged file.
    """
    tables = []
    for path in paths:
        try:
            if (blob := _blob(path, warn)) is not None:
                tables.append(pl.read_parquet(blob))
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            warn(f"{path} is damaged ({first_line(error)})")
    return pl.concat(tables, how="diagonal_relaxed") if tables else pl.DataFrame()


# Classes of the data sets that have as many in every run: for older rows, which lack the column `chance`.
CLASSES = {"cifar10": 10, "digits": 10, "fashion_mnist": 10}
# Values for rows of older files, which lack these columns.
BEFORE = {"task": "classification", "metric": "acc"}
FACTS = ("kind", "calibration", "sizes", "scope", "statistics", *BEFORE)


def read_joined(path: str | Path) -> pl.DataFrame:
    """Rows with the settings of their cells, as this or an older version of `scripts.report --out` wrote them."""
    rows = pl.read_parquet(path)
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items() if name not in rows.columns]
    return with_facts(rows.with_columns(missing))


def with_facts(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows, where those of older files get the columns that these files lacked, read out of their labels."""
    keys, facts = ["method", "stage"], [name for name in FACTS if name in rows.columns]
    if not {"kind", *keys} <= set(rows.columns) or not rows["kind"].null_count():
        return rows
    found = rows.filter(pl.col("kind").is_null()).select(keys).unique().rows()
    said = pl.DataFrame([dict(zip(keys, key, strict=True)) | facts_of_label(*key) for key in found])
    rows = rows.join(said, on=keys, how="left", suffix=" said", maintain_order="left")
    filled = (pl.coalesce(name, f"{name} said").alias(name) for name in facts)
    return rows.with_columns(filled).drop(f"{name} said" for name in facts)


def facts_of_label(label: str, stage: str) -> dict[str, str | None]:
    """FACTS of an older file's label; one that is no spelling ("fold-writers") tells its kind by how it begins."""
    from pipeline.compression.recipe import about, kind_of, names, parse  # brings torch, which newer files do not need

    if label == DENSE:
        return {**dict.fromkeys(FACTS), "kind": DENSE, **BEFORE}
    try:
        facts = about(parse(label))
    except UserError:
        method = next((name for name in sorted(names(), key=len, reverse=True) if label.startswith(name)), None)
        kind = kind_of(method) if method else "prune"
        facts = {"kind": kind, "calibration": "none", "sizes": "uniform", "statistics": "none"}
    return {**dict.fromkeys(FACTS), **facts, **BEFORE} | ({} if stage == "raw" else {"statistics": "data"})


def headline(rows: pl.DataFrame) -> Metric:
    """The headline metric of these rows. UserError where they have several."""
    found = rows["metric"].drop_nulls().unique().sort().to_list() if "metric" in rows.columns else []
    if len(found) > 1:
        raise UserError(f"these rows measure {' and '.join(found)}; show them apart, with --where")
    return METRICS[found[0] if found else BEFORE["metric"]]


def valued(rows: pl.DataFrame) -> pl.Expr:
    """The value of the headline metric in each row."""
    return pl.col(headline(rows).name)


def chance_level(rows: pl.DataFrame) -> pl.Expr:
    """The headline of answers that are drawn blindly, in each row; null where it is not known."""
    told = pl.col("chance") if "chance" in rows.columns else pl.lit(None, pl.Float64)
    before = 1 / pl.col("data").replace_strict(CLASSES, default=None, return_dtype=pl.Float64)
    return pl.coalesce(told, before) if headline(rows).name == "acc" else told


def blind(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of uncompressed networks that are no better than chance: what is left of them says nothing."""
    value, level = valued(rows), chance_level(rows)
    worse = value <= level if headline(rows).higher_is_better else value >= level
    return rows.filter((pl.col("status") == "ok") & (pl.col("method") == DENSE) & worse)


def measured(rows: pl.DataFrame, columns: Iterable[str] | None = None) -> pl.DataFrame:
    """The rows of compressed networks that have a value of their headline: failed rows and NaN are left out.

    columns: those that are wanted; None: all, of which a copy is several times as large.
    """
    value = valued(rows)
    there = value.is_not_null() & value.is_not_nan()
    kept = rows.select((pl.col("status") == "ok") & (pl.col("method") != DENSE) & there).to_series()
    return (rows if columns is None else rows.select(*dict.fromkeys(columns))).filter(kept)


def means(rows: pl.DataFrame) -> pl.DataFrame:
    """One line per (stage, method, ratio): value, the mean of the headline over what else differs, and n of it.

    Sorted by stage (those of TAILS first), then methods as they come in `rows`, then ratio. `measured` says which rows
    are left out.
    """
    keys = ["stage", "method"]
    mean = (
        measured(rows).group_by(*keys, "ratio", maintain_order=True).agg(valued(rows).mean().alias("value"), n=pl.len())
    )
    order = mean.select(keys).unique(maintain_order=True).with_row_index("order")
    named = {stage: i for i, stage in enumerate(TAILS)}
    stage = pl.col("stage").replace_strict(named, default=len(named), return_dtype=pl.Int64)
    return mean.join(order, on=keys).sort(stage, "order", "ratio").select(*keys, "ratio", "value", "n")


def side() -> pl.Expr:
    """Which side of the folding gap a row is on: "fold", "prune", or null.

    Null for methods that leave another network at the same ratio or saw more: masks, auto, calibrated ones, sizes
    under a budget, statistics guessed from the weights, and any scope but that of the first row of its cell that
    compares.
    """
    compares = (
        pl.col("kind").is_in(["fold", "mix", "prune"])
        & pl.col("calibration").eq_missing("none")
        & pl.col("sizes").eq_missing("uniform")
        & pl.col("statistics").ne_missing("weights")
        & ~pl.col("scope").is_in([unit for unit in UNITS if unit != "all"]).fill_null(False)
    )
    first = pl.col("scope").filter(compares).drop_nulls().first().over("cell")
    alike = pl.col("scope").is_null() | (pl.col("scope") == first)
    kind = pl.when(pl.col("kind") == "prune").then(pl.lit("prune")).otherwise(pl.lit("fold"))
    return pl.when(compares & alike).then(kind)


def foldability(dense: float, curve: Mapping[float, float], metric: Metric = METRICS["acc"]) -> float:
    """Area under the curve {ratio: value of the metric}, divided by its range of ratios.

    The curve starts at ratio 0 with the dense value and runs to the largest ratio measured (trapezoids), so the result
    is the mean value of a network that is made smaller by anything up to that ratio. A metric that is compared on a log
    axis gives the mean logarithm.
    """
    points = sorted({0.0: dense, **curve}.items())
    if metric.log:
        points = [(ratio, math.log(value)) for ratio, value in points]
    if len(points) == 1:
        return points[0][1]
    area = sum((r1 - r0) * (a0 + a1) / 2 for (r0, a0), (r1, a1) in pairwise(points))
    return area / (points[-1][0] - points[0][0])


@cache
def code_version() -> str:
    """Version of this package and, in a git checkout, the commit (with + when files differ from it)."""
    try:
        release = version("foldability")
    except PackageNotFoundError:
        release = "0"
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{release}+g{commit}" if commit else release
