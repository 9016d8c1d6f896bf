"""How far the cells of a sweep are and what makes a network foldable: one screen, and a page to open.

python -m scripts.report runs                  prints the screen and writes runs/report/index.html
python -m scripts.report runs --cells --no-page
python -m scripts.report runs --where optim.name=sgd --by optim.sam.rho --out rows.csv --plot curves.png
python -m scripts.report --compare runs/plain runs/sam            two runs, two folders of runs, or two files of rows
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.cells import STATES
from pipeline.metrics import METRICS, Metric
from pipeline.results import DENSE, SCHEMA, SPEED, headline, measured, read_speeds
from pipeline.study.chains import ChainRows, print_chains, read_chains
from pipeline.study.compare import compare, load_side
from pipeline.study.lines import told
from pipeline.study.page.families import Family, failures, families, rank, stages, states
from pipeline.study.page.files import write_report
from pipeline.study.pictures import plot_groups
from pipeline.study.summary import dense_value, foretold, headlines, last_measurement
from pipeline.study.sweep import COLUMNS, Sweep, joined, load, short, shown, split
from pipeline.study.terminal import points, print_comparison, print_speeds, print_table, terminal
from pipeline.tables import UserError, first_line, pick
from scripts.arguments import refuse, warn

OUTPUTS: dict[str, Callable[[pl.DataFrame, Path], Any]] = {
    ".csv": pl.DataFrame.write_csv,
    ".parquet": pl.DataFrame.write_parquet,
}
CONTEXT = {"split": "{} samples", "stage": "{}", "ratio": "ratio {}"}  # of a cell's values, where all share it
VALUES = ("dense", "fold", "prune", "gap")  # of a cell, see `headlines`
ENDS = 5  # the best and the worst cells that a screen shows
FITS = 16  # lines of methods that a screen has room for; with more, the stage that leads stands alone


def main() -> None:
    try:
        report(arguments())
    except UserError as error:
        refuse(error)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "folder of the cells (paths.runs of the sweep), or a .parquet of --out"
    parser.add_argument("runs", type=Path, nargs="?", help=what)
    what = "what B leaves beside A, over matched networks; takes --where, prints only"
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help=what)
    parser.add_argument("--where", action="append", default=[], metavar="SETTING=VALUE", help="these cells only")
    parser.add_argument("--by", action="append", default=[], metavar="SETTING", help="a mean table for each value")
    parser.add_argument("--cells", action="store_true", help="a line for every cell")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="where the page goes; RUNS/report if not given")
    parser.add_argument("--no-page", action="store_true", help="print only")
    parser.add_argument("--out", type=Path, help="all rows with their cells' settings, as .csv or .parquet")
    parser.add_argument("--plot", type=Path, help="mean curves as a picture; with --by, a row for each value")
    return parser.parse_args()


def report(args: argparse.Namespace) -> None:
    """Print the screen and write the files."""
    if args.compare is not None:
        return print_compared(args)
    if args.runs is None:
        raise UserError("no runs are named; give the folder that paths.runs named, or two with --compare A B")
    if args.out is not None:
        pick("kind of --out", OUTPUTS, args.out.suffix)
    whole = args.out is not None or not args.no_page
    sweep = load(args.runs, tuple(SCHEMA) if whole else COLUMNS, warn).where(args.where)
    by = [sweep.setting(name) for name in args.by]
    chains = chains_of(sweep, args.runs)
    found = [family for family in families(sweep) if not (chains and family.sweep.rows.is_empty())]
    if not found:
        print(f"{len(sweep.cells)} cells, which ran chains alone: {states(sweep)}")
    drawn: dict[str, dict[str, pl.DataFrame]] = {}  # by the metric, for no axis has two
    for family in found:
        print_answer(family, alone=len(found) == 1)
        for label, group in split(family.sweep.cells.filter(pl.col("state") == "done"), by):
            rows = means(family, label, group, FITS if len(found) == 1 else 0)
            if not rows.is_empty():
                drawn.setdefault(family.metric.name, {})[", ".join(filter(None, (family.label, label)))] = rows
        if args.cells:
            print_cells(family.sweep)
        elif len(found) == 1:
            print_ends(family.sweep)
    speeds = speeds_of(sweep, args.runs)
    print_speeds(speeds)
    for part in chains:
        print_chains(part.rows, part.times, part.title)
    if args.plot is not None:
        plot(args.plot, drawn)
    if args.out is not None:
        written(args.out, partial(OUTPUTS[args.out.suffix], joined(sweep)))
    if not args.no_page:
        folder = args.page or page_folder(args.runs)
        write_report(folder, args.runs, sweep, found, speeds, chains)
        print(f"wrote {folder / 'index.html'}; beside it: png, effects.csv, cells.parquet, summary.md")


def print_compared(args: argparse.Namespace) -> None:
    """Print two sweeps beside each other."""
    given = {name: getattr(args, name) for name in ("runs", "by", "cells", "page", "no_page", "out", "plot")}
    if others := [name for name, value in given.items() if value and name != "no_page"]:
        words = ", ".join(name if name == "runs" else f"--{name}" for name in others)
        raise UserError(f"--compare takes A, B and --where, and not {words}; leave that away")
    names = [str(path) for path in args.compare]
    print_comparison(compare([load_side(path, warn).where(args.where) for path in args.compare], names), names)


def page_folder(runs: Path) -> Path:
    """RUNS/report; beside a file, "rows-report" for rows.parquet."""
    return runs.with_name(f"{runs.stem}-report") if runs.is_file() else runs / "report"


def speeds_of(sweep: Sweep, runs: Path) -> pl.DataFrame:
    """Sizes and times of the networks of the done cells; a file of rows has none."""
    done = sweep.cells.filter(pl.col("state") == "done")["cell"]
    return read_speeds((runs / cell / SPEED for cell in done), warn) if runs.is_dir() else pl.DataFrame()


def chains_of(sweep: Sweep, runs: Path) -> list[ChainRows]:
    """The chains of the done cells; a file of rows has none."""
    done = sweep.cells.filter(pl.col("state") == "done")["cell"]
    return read_chains((runs / cell for cell in done), warn) if runs.is_dir() else []


def print_answer(family: Family, alone: bool) -> None:
    """Print how many cells of a family are in each state, why cells failed, and the answer."""
    console = terminal()
    print("\n" * (not alone), end="")
    console.print(f"{family.title}: {states(family.sweep)}", style="bold", markup=False, soft_wrap=True)
    for reason, count in failures(family.sweep):
        console.print(f"{count} cell{'s' * (count != 1)} ended with: {reason}", markup=False, soft_wrap=True)
    for number, sentence in enumerate(family.sentences, 1):
        console.print(f"{number}. {escape(sentence)}")


def print_cells(sweep: Sweep) -> None:
    """Print one line for every cell, then why cells failed."""
    differing, metric = sweep.differing(), headline(sweep.rows)
    lines = sweep.cells.join(headlines(sweep.rows), on="cell", how="left", maintain_order="left")
    state = pl.col("state").replace_strict({s: i for i, s in enumerate(STATES)}, default=len(STATES))
    lines = lines.sort(state, *differing, "cell", nulls_last=True)
    title, table = cells_table(lines, ["state", *differing], metric)
    console = terminal()
    console.print(f"\n{title}", style="bold", markup=False, soft_wrap=True)
    console.print(table)
    for name, reason in lines.filter(pl.col("reason") != "").select("cell", "reason").iter_rows():
        console.print(f"{name}: {reason}", markup=False, soft_wrap=True)


def print_ends(sweep: Sweep) -> None:
    """Print the ENDS best and the ENDS worst of the done cells, by what folding leaves, a line for each."""
    metric, settings = headline(sweep.rows), told(sweep)
    lines = sweep.cells.join(headlines(sweep.rows), on="cell", how="left", maintain_order="left")
    found = ends(lines, metric)
    if found.is_empty():
        return
    title, names = titled("Cells" if len(found) == len(lines) else f"Best and worst of {len(lines)} cells", found)
    console, table = terminal(), Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("cell", no_wrap=True, min_width=max(map(len, names)))
    for name in VALUES:
        table.add_column(name, justify="right", min_width=6)
    room = console.width - max(map(len, names)) - 9 * len(VALUES) - 6
    table.add_column("recipe", no_wrap=True, overflow="ellipsis", max_width=max(room, 20))
    for name, at in zip(names, found.iter_rows(named=True), strict=True):
        recipe = ", ".join(f"{short}={shown(at[full])}" for full, short in settings.items() if at[full] is not None)
        table.add_row(Text(name), *values_of(at, metric), Text(recipe))
    console.print(f"\n{title}", style="bold", markup=False, soft_wrap=True)
    console.print(table)


def ends(lines: pl.DataFrame, metric: Metric) -> pl.DataFrame:
    """The best ENDS and the worst ENDS of the done cells that have a folded value, the best first."""
    found = lines.filter((pl.col("state") == "done") & pl.col("fold").is_not_null())
    found = found.sort("fold", "cell", descending=[metric.higher_is_better, False])
    return found if len(found) <= 2 * ENDS else pl.concat([found.head(ENDS), found.tail(ENDS)])


def cells_table(lines: pl.DataFrame, columns: Sequence[str], metric: Metric) -> tuple[str, Table]:
    """(title, table), see `titled`."""
    title, cells = titled("Cells", lines)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    lines = lines.with_columns(pl.Series("cell", cells, dtype=pl.String))
    names = {"cell": "cell", **short(columns), "epoch": "epoch"}
    names |= {name: name for name in CONTEXT if lines[name].drop_nulls().n_unique() > 1}
    for name, header in names.items():
        table.add_column(header, overflow="fold", justify="left" if lines[name].dtype == pl.String else "right")
    for name in VALUES:
        table.add_column(name, justify="right")
    for at in lines.iter_rows(named=True):
        table.add_row(*(Text(shown(at[name])) for name in names), *values_of(at, metric))
    return title, table


def titled(kind: str, lines: pl.DataFrame) -> tuple[str, list[str]]:
    """(title, names of cells): what all cells share (name, which pictures, stage, ratio) is in the title alone."""
    alike = [name for name in CONTEXT if lines[name].drop_nulls().n_unique() == 1]
    prefix = {name.rpartition("-")[0] for name in lines["cell"]}  # a cell is <name>-<hash>
    shared = f"{name}-" if len(prefix) == 1 and (name := prefix.pop()) else ""
    told_of = (CONTEXT[name].format(shown(lines[name].drop_nulls()[0])) for name in alike)
    title = ", ".join([f"{kind} {shared}*" if shared else kind, *told_of])
    return title, [name.removeprefix(shared) for name in lines["cell"]]


def values_of(line: dict[str, Any], metric: Metric) -> list[str]:
    """The texts of VALUES."""
    forms = dict.fromkeys(VALUES, lambda value: metric.short(value).strip())
    forms["gap"] = lambda value: points(value, metric)
    return ["-" if line[name] is None else form(line[name]) for name, form in forms.items()]


def means(family: Family, label: str, group: pl.DataFrame, fits: int) -> pl.DataFrame:
    """Print the mean table of the cells of a group (fits: see `leading`); gives their rows."""
    rows = last_measurement(family.sweep.rows.join(group.select("cell"), on="cell", how="semi", maintain_order="left"))
    recipes = None if family.found is None else family.found.methods.select("cell", "recipe").unique()
    print_means(label, rows, len(group), fits, recipes)
    return rows


def print_means(label: str, rows: pl.DataFrame, done: int, fits: int, recipes: pl.DataFrame | None) -> None:
    """Print the mean table of these cells, or that there are no rows."""
    print()
    if rows.is_empty():
        return print(f"no cell {f'with {label} ' if label else ''}that is done has rows yet")
    dense, missing = dense_value(rows), done - rows["cell"].n_unique()
    notes = [f"; dense {headline(rows).text(dense)}"] * (dense is not None) + [f"; {missing} more have no rows"] * (
        missing > 0
    )
    fitting = leading(rows, fits)
    notes += ["; other stages are on the page"] * (len(fitting) < len(rows))
    print_table(fitting, means_title(label, rows) + "".join(notes), duel=True, recipes=recipes)
    if (found := foretold(rows)) is not None:
        told = f"Fidelity, which sees no data, ranks the {found.n} raw results at {found.value:.2f} (Spearman)"
        told += f" and the {found.gaps} gaps at {found.gap:.2f}" * (found.gaps > 2)
        told += f"; of {found.sure} clear gaps it names the winner in {found.sign:.0%}" * (found.sure > 0)
        print(f"{told}.")


def leading(rows: pl.DataFrame, fits: int) -> pl.DataFrame:
    """The rows; those of the stage that leads alone, where methods and stages together would take more than `fits`."""
    there = measured(rows).select("method", "stage").unique()
    if len(there) <= fits or there["stage"].n_unique() < 2:
        return rows
    first = min(stages(there["stage"].unique().to_list()), key=rank)
    return rows.filter((pl.col("stage") == first) | (pl.col("method") == DENSE))


def plot(path: Path, drawn: dict[str, dict[str, pl.DataFrame]]) -> None:
    """One picture of all groups, {metric: {label: rows}}; of several metrics curves-acc.png and so on."""
    for name, groups in drawn.items():
        place = path.with_stem(f"{path.stem}-{name}") if len(drawn) > 1 else path
        only = next(iter(groups.values()))
        title = means_title("", only) if len(groups) == 1 else f"Mean {METRICS[name].heading.lower()}"
        written(place, partial(plot_groups, groups, title=title))


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
