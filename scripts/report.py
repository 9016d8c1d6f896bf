"""How far the cells of a sweep are, what each leaves under compression, and the mean over those that are done.

python -m scripts.report runs
python -m scripts.report runs --where optim.name=sgd --by optim.sam.rho --out rows.csv --plot curves.png
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from yaml import YAMLError

from pipeline.cells import STATES, as_table, cells, flat, line
from pipeline.results import ROWS, SCHEMA, SPEED, headline, read_present, read_speeds
from pipeline.study import (
    dense_value,
    foretold,
    headlines,
    last_measurement,
    plot_curves,
    points,
    print_speeds,
    print_table,
    terminal,
)
from pipeline.tables import UserError, first_line, pick
from pipeline.tasks import METRICS, Metric

# What the tables are made of: reading the other columns takes as long again.
COLUMNS = [
    *"cell epoch method ratio stage split status reason params fidelity kind calibration".split(),
    *"sizes scope statistics metric".split(),
    *METRICS,
]
RECORD_COLUMNS = ("cell", "state", "reason", "seconds")  # of a cell, beside its settings
UNSHOWN = ("paths.", "wandb.")  # where files and logs go: no settings of what is run
OUTPUTS: dict[str, Callable[[pl.DataFrame, Path], Any]] = {
    ".csv": pl.DataFrame.write_csv,
    ".parquet": pl.DataFrame.write_parquet,
}


def main() -> None:
    try:
        report(arguments())
    except UserError as error:
        sys.exit(f"error: {error}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that holds the cells: paths.runs of the sweep")
    parser.add_argument("--where", action="append", default=[], metavar="SETTING=VALUE", help="these cells only")
    parser.add_argument("--by", action="append", default=[], metavar="SETTING", help="a mean table for each value")
    parser.add_argument("--out", type=Path, help="all rows with their cells' settings, as .csv or .parquet")
    parser.add_argument("--plot", type=Path, help="mean curves as a picture; with --by, one for each value")
    return parser.parse_args()


def report(args: argparse.Namespace) -> None:
    """Print the tables, write the files."""
    if args.out is not None:
        pick("kind of --out", OUTPUTS, args.out.suffix)
    sweep = load(args.runs, tuple(SCHEMA) if args.out else COLUMNS).where(args.where)
    by = [sweep.setting(name) for name in args.by]
    for metric, part in sweep.by_metric().items():
        print_cells(part)
        for label, group in split(part.cells.filter(pl.col("state") == "done"), by):
            rows = last_measurement(part.rows.join(group.select("cell"), on="cell", how="semi", maintain_order="left"))
            print_means(label, rows, len(group))
            if args.plot is not None and not rows.is_empty():
                name = "-".join(filter(None, (metric, label)))
                written(plot_path(args.plot, name), partial(picture, label, rows))
    done = sweep.cells.filter(pl.col("state") == "done")
    print_speeds(read_speeds((args.runs / cell / SPEED for cell in done["cell"]), warn))
    if args.out is not None:
        written(args.out, partial(OUTPUTS[args.out.suffix], joined(sweep)))


@dataclass(frozen=True)
class Sweep:
    """cells: one line per cell, as of `pipeline.cells.settings`; rows: what they measured."""

    cells: pl.DataFrame
    rows: pl.DataFrame

    @property
    def settings(self) -> list[str]:
        return [name for name in self.cells.columns if name not in RECORD_COLUMNS and not name.startswith(UNSHOWN)]

    def setting(self, name: str) -> str:
        """The full name of a setting; its last parts are enough where they name one only ("lr", "optim").

        Of checkpoints, what they were trained with ("named.") comes before what they were measured with.
        """
        found = [full for full in self.settings if name == full] or [
            full
            for full in self.settings
            if f".{full}".endswith(f".{name}") or f".{full.removesuffix('.name')}".endswith(f".{name}")
        ]
        if len(found) > 1:
            found = [full for full in found if full.startswith("named.")] or found
        if len(found) > 1:
            raise UserError(f"setting {name!r} could be any of: {', '.join(found)}")
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


def load(runs: Path, columns: Sequence[str] = COLUMNS) -> Sweep:
    """The cells under `runs` as they are now: a sweep that goes on may replace and add files meanwhile."""
    folders = cells(runs)
    if not folders:
        raise UserError(f"no cells in {runs}; give the folder that paths.runs named")
    lines: list[dict[str, Any]] = []

    def files() -> Iterator[Path]:
        # The record first: what reads as done has all its rows by then.
        for folder in folders:
            if (found := line(folder)) is not None:
                lines.append(found)
                yield folder / ROWS

    rows = read_present(files(), columns, warn)
    return Sweep(as_table(lines), rows)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


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
    """Full name -> its last parts, as few as tell it from the others; the name of a part is called like the part.

    optim.lr -> lr, optim.name -> optim, optim.schedule.name -> schedule
    """
    parts = {name: name.removesuffix(".name").split(".") for name in names}
    endings = {name: [".".join(p[-k:]) for k in range(1, len(p) + 1)] for name, p in parts.items()}
    taken = [ending for several in endings.values() for ending in several]
    return {name: next((e for e in several if taken.count(e) == 1), name) for name, several in endings.items()}


def print_cells(sweep: Sweep) -> None:
    """One line per cell, then why cells failed, then how many are in which state."""
    differing = sweep.differing()
    lines = sweep.cells.join(headlines(sweep.rows), on="cell", how="left", maintain_order="left")
    state = pl.col("state").replace_strict({s: i for i, s in enumerate(STATES)}, default=len(STATES))
    lines = lines.sort(state, *differing, "cell", nulls_last=True)
    console = terminal()
    title, table = cells_table(lines, differing, headline(sweep.rows))
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(table)
    counts = dict(lines["state"].value_counts().iter_rows())
    for name, reason in lines.filter(pl.col("reason") != "").select("cell", "reason").iter_rows():
        console.print(f"{name}: {reason}", markup=False, soft_wrap=True)
    console.print(", ".join(f"{counts.get(state, 0)} {state}" for state in STATES), style="bold")


def cells_table(lines: pl.DataFrame, differing: Sequence[str], metric: Metric) -> tuple[str, Table]:
    """Title and table: what is the same for all cells (name, which pictures, stage, ratio) is in the title."""
    context = {"split": "{} samples", "stage": "{}", "ratio": "ratio {}"}
    alike = [name for name in context if lines[name].drop_nulls().n_unique() == 1]
    prefix = {name.rpartition("-")[0] for name in lines["cell"]}  # of <name>-<hash>
    prefix = f"{name}-" if len(prefix) == 1 and (name := prefix.pop()) else ""
    lines = lines.with_columns(pl.col("cell").str.strip_prefix(prefix))
    title = ", ".join(
        [
            f"Cells {prefix}*" if prefix else "Cells",
            *(context[name].format(shown(lines[name].drop_nulls()[0])) for name in alike),
        ]
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    names = {"cell": "cell", "state": "state", **short(differing), "epoch": "epoch"}
    names |= {name: name for name in context if name not in alike and lines[name].null_count() < len(lines)}
    for name, header in names.items():
        table.add_column(header, overflow="fold", justify="left" if lines[name].dtype == pl.String else "right")
    forms = {name: lambda value: metric.short(value).strip() for name in ("dense", "fold", "prune")}
    forms["gap"] = lambda value: points(value, metric)
    for name in forms:
        table.add_column(name, justify="right")
    for at in lines.iter_rows(named=True):
        values = ("-" if at[n] is None else form(at[n]) for n, form in forms.items())
        table.add_row(*(Text(shown(at[name])) for name in names), *values)
    return title, table


def split(cells: pl.DataFrame, by: Sequence[str]) -> list[tuple[str, pl.DataFrame]]:
    """(label, cells) for every combination of the settings `by`; all cells without."""
    if not by:
        return [("", cells)]
    labels = short(by)
    groups = cells.sort(*by, nulls_last=True).partition_by(*by, as_dict=True, maintain_order=True)
    return [
        (", ".join(f"{labels[n]}={shown(v)}" for n, v in zip(by, values, strict=True)), group)
        for values, group in groups.items()
    ]


def print_means(label: str, rows: pl.DataFrame, done: int) -> None:
    """The mean table of these cells, if there is anything to show."""
    print()
    if rows.is_empty():
        return print(f"no cell {f'with {label} ' if label else ''}that is done has rows yet")
    dense, missing = dense_value(rows), done - rows["cell"].n_unique()
    notes = [f"; dense {headline(rows).text(dense)}"] * (dense is not None) + [f"; {missing} more have no rows"] * (
        missing > 0
    )
    print_table(rows, means_title(label, rows) + "".join(notes), duel=True)
    if (found := foretold(rows)) is not None:
        told = f"Fidelity, which sees no data, ranks the {found.n} raw results at {found.value:.2f} (Spearman)"
        told += f" and the {found.gaps} gaps at {found.gap:.2f}" * (found.gaps > 2)
        told += f"; of {found.sure} clear gaps it names the winner in {found.sign:.0%}" * (found.sure > 0)
        print(f"{told}.")


def picture(label: str, rows: pl.DataFrame, path: Path) -> None:
    plot_curves(rows, path, means_title(label, rows))


def plot_path(path: Path, label: str) -> Path:
    """curves.png, or of a split curves-optim=sgd.png"""
    return path.with_stem(path.stem + re.sub(r"[^\w.=+-]+", "_", f"-{label}")) if label else path


def means_title(label: str, rows: pl.DataFrame) -> str:
    n = rows["cell"].n_unique()
    splits = " and ".join(sorted(set(rows["split"])))
    cells = f"{n} done cell{'s' * (n != 1)}{f' with {label}' if label else ''}"
    return f"Mean {headline(rows).heading.lower().removeprefix('mean ')} over {cells}, {splits} samples"


def joined(sweep: Sweep) -> pl.DataFrame:
    """All rows, each with its cell's record and settings; of two columns of one name the cell's is "cell.<name>".

    Without the folders of this machine, so that the file can be passed on.
    """
    cells = sweep.cells.drop([name for name in sweep.cells.columns if name.startswith((*UNSHOWN, "data.root"))])
    if "checkpoint" in cells.columns:
        cells = cells.with_columns(pl.col("checkpoint").cast(pl.String).str.extract(r"([^/\\]+[/\\]?[^/\\]*)$"))
    taken = {name: f"cell.{name}" for name in cells.columns if name in SCHEMA and name != "cell"}
    return sweep.rows.join(cells.rename(taken), on="cell", how="left", maintain_order="left")


def written(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        write(path)
    except (OSError, ValueError) as error:  # ValueError: a kind of picture that matplotlib does not know
        raise UserError(f"{path} cannot be written: {first_line(error)}") from error
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
