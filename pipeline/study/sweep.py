"""The cells of a sweep: their settings, and the rows that they measured."""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.cells import as_table, cells, flat, line
from pipeline.metrics import METRICS
from pipeline.results import ROWS, SCHEMA, read_joined, read_present
from pipeline.tables import UserError, first_line, pick

# Columns that tables and statistics need. Reading the other columns, too, would take twice as long.
COLUMNS = [
    *"cell model data epoch method ratio stage split status reason params macs fidelity kind calibration".split(),
    *"sizes scope statistics metric chance".split(),
    *METRICS,
]
RECORD_COLUMNS = ("cell", "state", "reason", "seconds")  # of a cell's record; its other columns are settings
UNSHOWN = ("paths.", "wandb.")  # settings that only say where files and logs go
FEATURES = "features.parquet"  # beside the cells: columns of numbers on their networks (see pipeline.features)
FEATURE = "feature."  # how their columns begin among those of the cells


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep. rows: their measurements.

    cells: one line per cell, as `pipeline.cells.settings` gives, and columns "feature.<name>" where there are features
    """

    cells: pl.DataFrame
    rows: pl.DataFrame

    @property
    def settings(self) -> list[str]:
        beside = (*UNSHOWN, FEATURE)
        return [name for name in self.cells.columns if name not in RECORD_COLUMNS and not name.startswith(beside)]

    @property
    def done_rows(self) -> pl.DataFrame:
        """The rows of the cells that are done; all rows themselves, and no copy of them, where every cell is."""
        done = self.cells.filter(pl.col("state") == "done").select("cell")
        whole = len(done) == len(self.cells)
        return self.rows if whole else self.rows.join(done, on="cell", how="semi", maintain_order="left")

    @property
    def features(self) -> pl.DataFrame | None:
        """cell and a column for each feature of whole networks (those of a group, "name/group", are left out); None
        where no cell has features."""
        names = [name for name in self.cells.columns if name.startswith(FEATURE) and "/" not in name]
        named = {name.removeprefix(FEATURE): pl.col(name) for name in names if self.cells[name].count()}
        return self.cells.select("cell", **named) if named else None

    def setting(self, name: str) -> str:
        """The full name of a setting; its last parts are enough where only one setting ends so ("lr", "optim").

        A setting that a checkpoint was trained with ("named.") comes before one that it was measured with.
        """
        found = [full for full in self.settings if name == full] or [
            full
            for full in self.settings
            if f".{full}".endswith(f".{name}") or f".{full.removesuffix('.name')}".endswith(f".{name}")
        ]
        if len(found) > 1:
            found = [full for full in found if full.startswith("named.")] or found
        if len(found) > 1:
            raise UserError(f"setting {name!r} could be any of: {', '.join(found)}; give more of its name")
        return found[0] if found else pick("setting", {full: full for full in self.settings}, name)

    def where(self, conditions: Sequence[str]) -> "Sweep":
        """The cells that meet all conditions "setting=value", with values as the training command takes them."""
        kept = self.cells
        for condition in conditions:
            name, value = parsed(condition)
            name = self.setting(name)
            matches = [same(v, value) for v in kept[name]]
            if not any(matches):
                there = ", ".join(sorted(map(shown, kept[name].unique())))
                raise UserError(f"no cell has {name}={shown(value)}; there are: {there}")
            kept = kept.filter(pl.Series(matches, dtype=pl.Boolean))
        return Sweep(kept, self.rows.join(kept.select("cell"), on="cell", how="semi", maintain_order="left"))

    def by_metric(self) -> dict[str, "Sweep"]:
        """The cells of every headline apart, for no mean is over two; "": all, where there is one headline alone.

        Cells that have no rows are with the first.
        """
        found = set(self.rows["metric"].drop_nulls())
        if len(found) < 2:
            return {"": self}
        parts: dict[str, Sweep] = {}
        for name in (name for name in METRICS if name in found):
            rows = self.rows.filter(pl.col("metric") == name)
            own = self.cells["cell"].is_in(rows["cell"].unique().to_list())
            bare = ~self.cells["cell"].is_in(self.rows["cell"].unique().to_list())
            parts[name] = Sweep(self.cells.filter(own if parts else own | bare), rows)
        return parts

    def differing(self) -> list[str]:
        """The settings that are not the same in all cells."""
        return [name for name in self.settings if self.cells[name].n_unique() > 1]


def load(runs: Path, columns: Sequence[str] = COLUMNS, warn: Callable[[str], None] = warnings.warn) -> Sweep:
    """The cells under `runs` as they are now: a sweep that goes on may replace and add files meanwhile.

    runs: the folder that paths.runs named, a .parquet file of `scripts.report --out`, or a CSV file of the published
        study (see pipeline.study.published)
    """
    if runs.is_file():
        from pipeline.study.published import published  # it imports this module for Sweep

        return separated(read_joined(runs)) if runs.suffix == ".parquet" else published(runs, warn=warn)
    folders = cells(runs)
    if not folders:
        raise UserError(f"no cells in {runs}; give the folder that paths.runs named")
    lines: list[dict[str, Any]] = []

    def files() -> Iterator[Path]:
        # The record is read before the rows: a cell whose record says "done" has all its rows by then.
        for folder in folders:
            if (found := line(folder)) is not None:
                lines.append(found)
                yield folder / ROWS

    rows = read_present(files(), columns, warn)
    return Sweep(with_features(as_table(lines), runs / FEATURES, warn), rows)


def with_features(cells: pl.DataFrame, path: Path, warn: Callable[[str], None] = warnings.warn) -> pl.DataFrame:
    """The cells with the columns of a file of features, where it exists; `warn` is told where it is damaged."""
    try:
        found = pl.read_parquet(path)
        named = {name: f"{FEATURE}{name}" for name in found.columns if name != "cell"}
        return cells.join(found.rename(named), on="cell", how="left", maintain_order="left")
    except FileNotFoundError:
        return cells
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        warn(f"{path} is damaged ({first_line(error)}); delete it and run the command that wrote it again")
        return cells


def parsed(condition: str) -> tuple[str, Any]:
    """ "optim.lr=1e-3" -> ("optim.lr", 0.001)"""
    name, equals, _ = condition.partition("=")
    try:
        found = flat(OmegaConf.to_container(OmegaConf.from_dotlist([condition])))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"--where {condition}: {first_line(error)}") from error
    if not equals or list(found) != [name]:
        raise UserError(f"--where {condition}: give SETTING=VALUE, for example optim.name=sgd")
    return name, found[name]


def same(a: Any, b: Any) -> bool:
    return a == b or str(a) == str(b)


def shown(value: Any) -> str:
    """A value as in the training command: [crop,flip], 0.1; - where the cell has no such setting."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else re.sub(r'"|(?<=,) ', "", str(value))


def short(names: Sequence[str]) -> dict[str, str]:
    """{full name: its last parts, as few as tell it from the others}; a last part "name" is left out.

    optim.lr -> lr, optim.name -> optim, optim.schedule.name -> schedule
    """
    parts = {name: name.removesuffix(".name").split(".") for name in names}
    endings = {name: [".".join(p[-k:]) for k in range(1, len(p) + 1)] for name, p in parts.items()}
    taken = [ending for several in endings.values() for ending in several]
    return {name: next((e for e in several if taken.count(e) == 1), name) for name, several in endings.items()}


def split(cells: pl.DataFrame, by: Sequence[str]) -> list[tuple[str, pl.DataFrame]]:
    """(label, cells) for every combination of the settings `by`; one pair with all cells where `by` is empty."""
    if not by:
        return [("", cells)]
    labels = short(by)
    groups = cells.sort(*by, nulls_last=True).partition_by(*by, as_dict=True, maintain_order=True)
    return [
        (", ".join(f"{labels[n]}={shown(v)}" for n, v in zip(by, values, strict=True)), group)
        for values, group in groups.items()
    ]


def joined(sweep: Sweep) -> pl.DataFrame:
    """All rows, each with its cell's record and settings; a setting named like a field of Row becomes "cell.<name>".

    Folders of this machine are left out, so that the file can be passed on.
    """
    return joining(sweep).collect()


def joining(sweep: Sweep) -> pl.LazyFrame:
    """`joined`, for a file that is written part by part."""
    cells = sweep.cells.drop([name for name in sweep.cells.columns if name.startswith((*UNSHOWN, "data.root"))])
    if "checkpoint" in cells.columns:
        cells = cells.with_columns(pl.col("checkpoint").cast(pl.String).str.extract(r"([^/\\]+[/\\]?[^/\\]*)$"))
    taken = {name: f"cell.{name}" for name in cells.columns if name in SCHEMA and name != "cell"}
    return sweep.rows.lazy().join(cells.rename(taken).lazy(), on="cell", how="left", maintain_order="left")


def separated(table: pl.DataFrame) -> Sweep:
    """The sweep whose rows and settings `joined` put into one table."""
    names = [name for name in table.columns if name not in SCHEMA]
    cells = table.select("cell", *names).unique("cell", maintain_order=True)
    cells = cells.rename({name: name.removeprefix("cell.") for name in names if name.startswith("cell.")})
    lacking = {"state": pl.lit("done"), "reason": pl.lit(""), "seconds": pl.lit(0.0)}
    cells = cells.with_columns(**{name: value for name, value in lacking.items() if name not in cells.columns})
    return Sweep(cells, table.select(list(SCHEMA)))
