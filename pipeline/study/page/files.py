"""The folder that a report leaves: the page, pictures for papers, tables and the answer as text."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pipeline.study.chains import ChainRows, over_cells
from pipeline.study.claims import FEWEST
from pipeline.study.intervals import SHOWN
from pipeline.study.page.families import Family, failures, stages, states
from pipeline.study.page.html import page, places_of
from pipeline.study.pictures import plot_pareto
from pipeline.study.sweep import Sweep, joining
from pipeline.tables import UserError, first_line

GROUP = 20_000  # rows
FILES = ("index.html", "png", "effects.csv", "cells.parquet", "summary.md")


def write_report(
    folder: Path,
    runs: Path,
    whole: Sweep,
    parts: Sequence[Family],
    speeds: pl.DataFrame,
    chains: Sequence[ChainRows] = (),
) -> list[Path]:
    """Write FILES into a folder, which is made where it is missing; gives their paths.

    runs: where the sweep is from; speeds: lines of `read_speeds`; chains: those that cells ran, a picture and a table
    for each model and data set. UserError where the folder cannot be written.
    """
    title = f"Foldability of {runs.resolve().stem}"
    try:
        (folder / "png").mkdir(parents=True, exist_ok=True)
        (folder / "summary.md").write_text(summary(title, whole, parts))
        effects_table(parts).write_csv(folder / "effects.csv")
        write_cells(whole, folder / "cells.parquet")
        write_pictures(folder / "png", parts)
        write_chains(folder, chains)
        (folder / "index.html").write_text(page(title, whole, parts, places_of(whole, runs, folder), speeds, chains))
    except OSError as error:
        what = f"{folder} cannot be written ({first_line(error)})"
        raise UserError(f"{what}; give another --page, or --no-page") from error
    return [folder / name for name in FILES]


def write_cells(whole: Sweep, path: Path) -> None:
    """Write `joined` of a sweep, GROUP rows at a time: all at once would take more memory than the rest of a report."""
    starts = range(0, max(len(whole.rows), 1), GROUP)
    parts = [joining(Sweep(whole.cells, whole.rows.slice(start, GROUP))) for start in starts]
    pl.concat(parts).sink_parquet(path, row_group_size=GROUP)


def write_pictures(folder: Path, parts: Sequence[Family]) -> None:
    """PAPERS of every family, "curves.png", or with several families "curves-resnet18.png".

    Pictures of an earlier report go first, so that none stays that this one would not draw.
    """
    from pipeline.study.page.papers import PAPERS  # brings matplotlib, which takes a second, to those who want pictures

    for name in PAPERS:
        for old in folder.glob(f"{name}*.png"):
            old.unlink()
    for family in parts:
        for name, draw in PAPERS.items():
            if family.shown is not None and (figure := draw(family)) is not None:
                figure.savefig(folder / f"{'-'.join(filter(None, (name, family.slug)))}.png", dpi=200)


def write_chains(folder: Path, chains: Sequence[ChainRows]) -> None:
    """png/pareto.png, or with several networks "pareto-resnet18-on-cifar10.png", and the lines of all in chains.csv."""
    for old in (*(folder / "png").glob("pareto*.png"), folder / "chains.csv"):
        old.unlink(missing_ok=True)
    for part in chains:
        plot_pareto(part.rows, folder / "png" / f"pareto{part.slug if len(chains) > 1 else ''}.png", part.times)
    if chains:
        lines = (over_cells(part.rows).with_columns(network=pl.lit(part.title)) for part in chains)
        pl.concat(lines).write_csv(folder / "chains.csv")


def effects_table(parts: Sequence[Family]) -> pl.DataFrame:
    """Effects of every family and stage, at the ratio that leads and for the area under the curve.

    enough_for: what the pairs of a line are enough for: an estimate; from SHOWN on an interval; from FEWEST on a
    sentence. An effect that changes its sign has a line for each level of what it depends on (see `effects`), and both
    stand in the table however few their pairs are, so that neither hides.
    """
    n = pl.col("n")
    enough = (
        pl.when(n < SHOWN)
        .then(pl.lit("estimate"))
        .when(n < FEWEST)
        .then(pl.lit("interval"))
        .otherwise(pl.lit("sentence"))
    )
    tables = []
    for family in parts:
        if family.found is None or family.shown is None:
            continue
        for stage in stages(family.found.table["stage"].unique().to_list()):
            for ratio in (family.shown[1], None):
                found = family.effects(stage, ratio)
                tables.append(found.select(pl.lit(family.title).alias("family"), pl.all(), enough.alias("enough_for")))
    return pl.concat(tables, how="diagonal_relaxed") if tables else pl.DataFrame({"family": []})


def summary(title: str, whole: Sweep, parts: Sequence[Family]) -> str:
    """The answer of every family in plain sentences, as Markdown."""
    failed = [f"- {count} cells: {reason}" for reason, count in failures(whole)]
    lines = [f"# {title}", "", f"{len(whole.cells)} cells: {states(whole)}.", *failed]
    for family in parts:
        heading = ["", f"## {family.title[0].upper()}{family.title[1:]}"] if len(parts) > 1 else []
        lines += [*heading, "", *(f"{i}. {sentence}" for i, sentence in enumerate(family.sentences, 1))]
    return "\n".join(lines) + "\n"
