"""How far the cells of a sweep are, what each leaves under compression, and the mean over those that are done.

python -m scripts.report runs
python -m scripts.report runs --where optim.name=sgd --by optim.sam.rho --out rows.csv --plot curves.png
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pipeline.cells import STATES
from pipeline.results import SCHEMA, SPEED, headline, read_speeds
from pipeline.study.pictures import plot_curves
from pipeline.study.summary import dense_value, foretold, headlines, last_measurement
from pipeline.study.sweep import COLUMNS, Sweep, joined, load, short, shown, split
from pipeline.study.terminal import points, print_speeds, print_table, terminal
from pipeline.tables import UserError, first_line, pick
from pipeline.tasks import Metric

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
    """Print the tables and write the files."""
    if args.out is not None:
        pick("kind of --out", OUTPUTS, args.out.suffix)
    sweep = load(args.runs, tuple(SCHEMA) if args.out else COLUMNS, warn).where(args.where)
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


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def print_cells(sweep: Sweep) -> None:
    """Print one line per cell, then why cells failed, then how many cells are in each state."""
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
    """(title, table); values that all cells share (name, which pictures, stage, ratio) are in the title."""
    context = {"split": "{} samples", "stage": "{}", "ratio": "ratio {}"}
    alike = [name for name in context if lines[name].drop_nulls().n_unique() == 1]
    prefix = {name.rpartition("-")[0] for name in lines["cell"]}  # a cell is <name>-<hash>
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


def print_means(label: str, rows: pl.DataFrame, done: int) -> None:
    """Print the mean table of these cells, or that there are no rows."""
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
    """curves.png, or for one group of --by, curves-optim=sgd.png"""
    return path.with_stem(path.stem + re.sub(r"[^\w.=+-]+", "_", f"-{label}")) if label else path


def means_title(label: str, rows: pl.DataFrame) -> str:
    n = rows["cell"].n_unique()
    splits = " and ".join(sorted(set(rows["split"])))
    cells = f"{n} done cell{'s' * (n != 1)}{f' with {label}' if label else ''}"
    return f"Mean {headline(rows).heading.lower().removeprefix('mean ')} over {cells}, {splits} samples"


def written(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        write(path)
    except (OSError, ValueError) as error:  # ValueError: a kind of picture that matplotlib does not know
        raise UserError(f"{path} cannot be written: {first_line(error)}") from error
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
