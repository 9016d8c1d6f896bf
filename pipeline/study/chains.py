"""The rows of chains: which stages follow which, the front of the best networks, and tables for the terminal."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import polars as pl
from rich.markup import escape
from rich.table import Table

from pipeline.results import CHAIN_ROWS, CHAIN_SPEED, SCHEMA, headline, read_present, read_speeds, valued
from pipeline.study.summary import last_measurement
from pipeline.study.terminal import print_doubts, terminal, timed

ARROW = " > "
MEANS = ("bytes", "params", "macs", "seconds", "unlabelled", "labelled")
SAME = 0.01  # fraction by which two costs may differ and count as one


def of_chains(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows that chains measured, of each cell's last measurement, with `value`, the headline."""
    there = pl.col("bytes").is_not_null() & (pl.col("status") == "ok")
    found = last_measurement(rows).filter(there).with_columns(value=valued(rows))
    return found.filter(pl.col("value").is_not_null() & pl.col("value").is_not_nan())


@dataclass(frozen=True)
class ChainRows:
    """Rows and times (None: none were taken) of the chains of cells of one model, data set and headline."""

    title: str
    rows: pl.DataFrame
    times: pl.DataFrame | None

    @property
    def slug(self) -> str:
        """ "-resnet18-on-cifar10", a part of a file's name"""
        return re.sub(r"[^\w.=+-]+", "-", f"-{self.title}")


def read_chains(folders: Iterable[Path], warn: Callable[[str], None]) -> list[ChainRows]:
    """The chains that these cells ran, by model, data set and headline; [] where none did. warn: see read_present."""
    folders = list(folders)
    rows = read_present((folder / CHAIN_ROWS for folder in folders), tuple(SCHEMA), warn)
    times = read_speeds((folder / CHAIN_SPEED for folder in folders), warn)
    found = []
    for (model, data, _), part in rows.group_by("model", "data", "metric", maintain_order=True):
        if of_chains(part).is_empty():
            continue
        own = times.join(part, on="cell", how="semi", maintain_order="left") if len(times) else times
        found.append(ChainRows(f"{model} on {data}", part, own if len(own) else None))
    return found


def over_cells(rows: pl.DataFrame) -> pl.DataFrame:
    """A line for each chain: the means over cells of value and MEANS, n samples, cells, and sd of value over cells.

    sd is null for one cell. A chain that some cells lack is left out: its mean would be of other networks than those
    of the lines beside it.
    """
    found = of_chains(rows).unique(["cell", "chain"], keep="last", maintain_order=True)
    means = pl.col("value", *MEANS).mean()
    lines = found.group_by("chain", maintain_order=True).agg(
        means, pl.col("n").max(), cells=pl.len(), sd=pl.col("value").std()
    )
    return lines.filter(pl.col("cells") == pl.col("cells").max())


def paths(chains: Sequence[str]) -> dict[str, list[str]]:
    """{chain that no other goes on from: it and all chains that it goes on from, shortest first}."""
    steps = {chain: tuple(chain.split(ARROW)) if chain else () for chain in chains}
    begun = {tuple(of[:i]) for of in steps.values() for i in range(len(of))}
    return {
        leaf: sorted((one for one in steps if of[: len(steps[one])] == steps[one]), key=lambda one: len(steps[one]))
        for leaf, of in steps.items()
        if of not in begun
    }


def front(costs: Sequence[float], values: Sequence[float], upward: bool = True) -> list[int]:
    """Places of the networks that no other one beats: none is better and costs no more, or as good and costs less.

    In the order of their costs. Of several that are alike the first is there. Costs within SAME of each other are one:
    a repair adds a line to a file, and that makes no network the smaller one.
    """
    sign = 1 if upward else -1
    found: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -sign * values[i], i)):
        if found and sign * values[i] <= sign * values[found[-1]]:
            continue
        if found and costs[i] <= costs[found[-1]] * (1 + SAME):
            found.pop()
        found.append(i)
    return found


def costs(lines: pl.DataFrame, times: pl.DataFrame | None) -> dict[str, pl.DataFrame]:
    """{heading of an axis: lines of `over_cells` that have it, with `cost`}: kB, and each runtime's milliseconds."""
    found = {"file, kB": lines.with_columns(cost=pl.col("bytes") / 1000)}
    for (runtime, size), part in ({} if times is None else by_runtime(times)).items():
        # Times of different minutes do not compare on a busy machine, while a speedup was measured in turns.
        whole = part.filter(pl.col("speedup").is_null())["median"].drop_nulls().first()
        beside = pl.lit(whole, pl.Float64) / pl.col("speedup")
        taken = part.drop_nulls("median").select("chain", cost=pl.coalesce(beside, "median") * 1000)
        if len(joined := lines.join(taken, on="chain", maintain_order="left")):
            found[f"{runtime}, batch {size}, ms"] = joined
    return found


def by_runtime(times: pl.DataFrame) -> dict[tuple[str, int], pl.DataFrame]:
    """{(runtime, batch size): a line for each chain, `median` seconds and `speedup`, the medians over cells}"""
    found = times.fill_nan(None).group_by("runtime", "batch_size", "chain", maintain_order=True)
    medians = found.agg(pl.col("median", "speedup").median())
    return medians.partition_by("runtime", "batch_size", as_dict=True, maintain_order=True)


def chain_lines(rows: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """(headings, a line of texts for each chain): a stage stands below the one that it follows, see `tree`.

    An asterisk: on the front over bytes.
    """
    metric, found = headline(rows), over_cells(rows)
    best = {found["chain"][i] for i in front(found["bytes"], found["value"], metric.higher_is_better)}
    by_chain = {row["chain"]: row for row in found.iter_rows(named=True)}
    lines = []
    for chain, label in tree(list(by_chain)):
        row = by_chain[chain]
        spread = "" if row["sd"] is None else f" ± {metric.scale * row['sd']:.{metric.digits}f}"
        texts = [label + " *" * (chain in best), metric.short(row["value"]).strip() + spread]
        texts += [f"{row['bytes'] / 1000:,.1f}", f"{row['params']:,.0f}", f"{row['macs'] / 1e6:,.2f} M"]
        seen = f"{row['unlabelled']:,.0f}" + (f" + {row['labelled']:,.0f} with labels" if row["labelled"] else "")
        lines.append([*texts, f"{row['seconds']:,.1f}", seen])
    return ["stage", metric.heading, "file, kB", "parameters", "MACs", "seconds", "samples seen"], lines


def chain_table(rows: pl.DataFrame) -> Table:
    """`chain_lines` for the terminal."""
    names, lines = chain_lines(rows)
    table = Table()
    table.add_column(names[0], no_wrap=True)
    for name in names[1:]:
        table.add_column(name, justify="right")
    for label, *texts in lines:
        table.add_row(escape(label), *texts)
    return table


def time_table(rows: pl.DataFrame, times: pl.DataFrame) -> Table:
    """Stages x runtimes and batch sizes: the time of a pass, and how many times as fast as the uncompressed network."""
    table = Table()
    table.add_column("stage", no_wrap=True)
    columns = by_runtime(times)
    for runtime, size in columns:
        table.add_column(f"{runtime}, batch {size}", justify="right")
    at = {(t["chain"], *key): t for key, part in columns.items() for t in part.iter_rows(named=True)}
    for chain, label in tree(over_cells(rows)["chain"].to_list()):
        table.add_row(escape(label), *(timed(at.get((chain, *column))) for column in columns))
    return table


def tree(chains: Sequence[str]) -> list[tuple[str, str]]:
    """(chain, its last stage), each chain behind those that it goes on from.

    Where several stages follow one they are indented below it; a single one stands behind ">".
    """
    ways = list(paths(chains).values())
    follows = {pair for path in ways for pair in pairwise(path)}
    count = Counter(before for before, _ in follows)
    depths: dict[str, int] = {}
    found = {}
    for before, chain in (pair for path in ways for pair in pairwise([None, *path])):
        if chain in found:
            continue
        branches = before is not None and count[before] > 1
        depths[chain] = 0 if before is None else depths[before] + branches
        last = "uncompressed" if before is None else chain.removeprefix(before).removeprefix(ARROW)
        found[chain] = "  " * depths[chain] + "> " * (before is not None and not branches) + last
    return list(found.items())


def print_chains(rows: pl.DataFrame, times: pl.DataFrame | None = None, network: str = "") -> None:
    """The tables of chains on the terminal, means over cells, and a line for each reason why a stage failed.

    network: whose they are, "resnet18 on cifar10", where that is not plain.
    """
    console, every, found = terminal(), of_chains(rows), over_cells(rows)
    cells = found["cells"].max()
    over = f", means ± standard deviations over {cells} cells" if cells > 1 else ""
    title = f"\nWhat every stage leaves{network and f' of {network}'}{over}"
    title += f", {found['n'].max():,} {every['split'][0]} samples"
    console.print(f"{title}; *: nothing smaller is as good", style="bold", markup=False, soft_wrap=True)
    console.print(chain_table(rows))
    if left := every["chain"].n_unique() - len(found):
        console.print(f"{left} stages that not all {cells} cells have are left out", markup=False, soft_wrap=True)
    failed = last_measurement(rows).filter(pl.col("status") == "failed").group_by("reason", maintain_order=True).len()
    for reason, count in failed.iter_rows():
        console.print(f"{count} stages failed: {reason}", markup=False, soft_wrap=True)
    if times is not None:
        title = "Their times; in brackets how many times as fast as the uncompressed network under the same runtime"
        console.print(title, style="bold", markup=False, soft_wrap=True)
        console.print(time_table(rows, times))
        print_doubts(times)
