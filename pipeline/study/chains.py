"""The rows of chains: which stages follow which, the front of the best networks, and tables for the terminal."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import polars as pl
from rich.markup import escape
from rich.table import Table

from pipeline.results import headline, valued
from pipeline.study.summary import last_measurement
from pipeline.study.terminal import print_doubts, terminal, timed

ARROW = " > "
SAME = 0.01  # fraction by which two costs may differ and count as one


def of_chains(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows that chains measured, of each cell's last measurement, with `value`, the headline."""
    there = pl.col("bytes").is_not_null() & (pl.col("status") == "ok")
    found = last_measurement(rows).filter(there).with_columns(value=valued(rows))
    return found.filter(pl.col("value").is_not_null() & pl.col("value").is_not_nan())


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


def costs(rows: pl.DataFrame, times: pl.DataFrame | None) -> dict[str, pl.DataFrame]:
    """{heading of an axis: the rows that have it, with `cost`}: kilobytes, and milliseconds of each runtime."""
    found = {"file, kB": rows.with_columns(cost=pl.col("bytes") / 1000)}
    if times is None:
        return found
    times = times.fill_nan(None).drop_nulls("median")
    for (runtime, size), part in times.group_by("runtime", "batch_size", maintain_order=True):
        taken = part.select("cell", "chain", cost=pl.col("median") * 1000).unique(["cell", "chain"], keep="last")
        joined = rows.join(taken, on=["cell", "chain"], maintain_order="left")
        if len(joined):
            found[f"{runtime}, batch {size}, ms"] = joined
    return found


def chain_table(rows: pl.DataFrame) -> Table:
    """Stages x sizes; a stage stands below the one that it follows. An asterisk: on the front over bytes."""
    metric = headline(rows)
    found = of_chains(rows)
    best = {found["chain"][i] for i in front(found["bytes"], found["value"], metric.higher_is_better)}
    table = Table()
    table.add_column("stage", no_wrap=True)
    for name in (metric.heading, "file, kB", "parameters", "MACs", "seconds", "samples seen"):
        table.add_column(name, justify="right")
    by_chain = {row["chain"]: row for row in found.iter_rows(named=True)}
    for chain, label in tree(list(by_chain)):
        row = by_chain[chain]
        table.add_row(
            escape(label) + " *" * (chain in best),
            metric.short(row["value"]).strip(),
            f"{row['bytes'] / 1000:,.1f}",
            f"{row['params']:,}",
            f"{row['macs'] / 1e6:,.2f} M",
            f"{row['seconds']:,.1f}",
            f"{row['unlabelled']:,}" + (f" + {row['labelled']:,} with labels" if row["labelled"] else ""),
        )
    return table


def time_table(rows: pl.DataFrame, times: pl.DataFrame) -> Table:
    """Stages x runtimes and batch sizes: the time of a pass, and how many times as fast as the uncompressed network."""
    table = Table()
    table.add_column("stage", no_wrap=True)
    columns = list(dict.fromkeys(times.select("runtime", "batch_size").iter_rows()))
    for runtime, size in columns:
        table.add_column(f"{runtime}, batch {size}", justify="right")
    at = {(t["chain"], t["runtime"], t["batch_size"]): t for t in times.iter_rows(named=True)}
    for chain, label in tree(of_chains(rows)["chain"].to_list()):
        found = [timed(_without_nan(at.get((chain, *column)))) for column in columns]
        table.add_row(escape(label), *found)
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


def _without_nan(line: dict[str, Any] | None) -> dict[str, Any] | None:
    """NaN stands for a time that is missing, which tables show as none."""
    return line and {name: None if value != value else value for name, value in line.items()}


def print_chains(rows: pl.DataFrame, times: pl.DataFrame | None = None) -> None:
    """The tables of chains on the terminal, and a line for each reason why a stage failed."""
    console, found = terminal(), of_chains(rows)
    title = (
        f"\nWhat every stage leaves, {found['n'].max():,} {found['split'][0]} samples; *: nothing smaller is as good"
    )
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(chain_table(rows))
    failed = last_measurement(rows).filter(pl.col("status") == "failed").group_by("reason", maintain_order=True).len()
    for reason, count in failed.iter_rows():
        console.print(f"{count} stages failed: {reason}", markup=False, soft_wrap=True)
    if times is not None:
        title = "Their times; in brackets how many times as fast as the uncompressed network under the same runtime"
        console.print(title, style="bold", markup=False, soft_wrap=True)
        console.print(time_table(rows, times))
        print_doubts(times)
