"""Measures what chains of compression leave of trained networks, at equal bytes and at equal time.

    python -m benchmarks.chains run resnet20-12fca82f.th model=resnet20 $NORMAL $COMMON      # and resnet32
    python -m benchmarks.chains run runs/trained/trained-.../last.ckpt model=resnet9 model.width=32 $COMMON
    python -m benchmarks.chains page runs/chains

    NORMAL: data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]
    COMMON: data.root=cifar10.npz paths.runs=runs/chains profile.runtimes=[onnx] profile.batch_sizes=[1,32]

`run` is scripts.compress with the chains of CURVES; every other word is passed on, and it goes on where it was. A
network without BatchNorm takes --without-repair. Each stage sees 512 training pictures, repair 2,048 and distillation
all of them, without labels. All chains were written down before any of them was measured, and networks are measured on
all test pictures. `page` writes docs/chains.md from benchmarks/results/chains.parquet, in which networks that are found
in the folder replace those of the same name.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.common import line, write_below
from pipeline.cells import cells, read_record
from pipeline.results import CHAIN_ROWS, CHAIN_SPEED, read
from pipeline.stages import parse_chain, spell_chain
from pipeline.study.intervals import SHOWN, summary

ROWS = Path("benchmarks/results/chains.parquet")
SPEEDS = Path("benchmarks/results/chain_speed.parquet")
PAGE = Path("docs/chains.md")
MARK = "<!-- written by python -m benchmarks.chains from here on -->"
LOW = "quantize(bits={},rounding=gptq) > repair"
DISTIL = "mix+data@0.5 > repair > distil(epochs=5)"
# By name: the points of a curve, from the largest network to the smallest. A curve changes one thing.
CURVES: dict[str, list[str]] = {
    "prune": [f"l1@{ratio} > repair" for ratio in (0.3, 0.5, 0.7)],
    "fold": [f"fold@{ratio} > repair" for ratio in (0.3, 0.5, 0.7)],
    "mix+data": [f"mix+data@{ratio} > repair" for ratio in (0.3, 0.5, 0.7)],
    "distil": [DISTIL],
    "quantize": [LOW.format(bits) for bits in (8, 4, 3, 2)],
    "prune > 4 bits": [f"l1@{ratio} > repair > {LOW.format(4)}" for ratio in (0.3, 0.5, 0.7)],
    "fold > 4 bits": [f"fold@{ratio} > repair > {LOW.format(4)}" for ratio in (0.3, 0.5, 0.7)],
    "mix+data > 4 bits": [f"mix+data@{ratio} > repair > {LOW.format(4)}" for ratio in (0.3, 0.5, 0.7)],
    "mix+data > 3 bits": [f"mix+data@{ratio} > repair > {LOW.format(3)}" for ratio in (0.3, 0.5, 0.7)],
    "mix+data > distil > bits": [f"{DISTIL} > {LOW.format(bits)}" for bits in (8, 4, 3, 2)],
    "int8": ["ptq"],
    "prune > int8": [f"l1@{ratio} > repair > ptq" for ratio in (0.3, 0.5, 0.7)],
    "mix+data > int8": [f"mix+data@{ratio} > repair > ptq" for ratio in (0.3, 0.5, 0.7)],
    "mix+data > distil > int8": [f"{DISTIL} > ptq"],
}
SMALLER = (4, 7, 10, 14, 20, 25)  # at which curves are compared
FASTER = (1.5, 2, 3, 4)
RUNTIMES = {1: "onnx, batch 1", 32: "onnx, batch 32"}
TIMED = {"network": pl.String, "chain": pl.String, "runtime": pl.String, "batch_size": pl.Int64, "speedup": pl.Float64}
BESIDE = "quantize"  # the curve that others are compared with at equal bytes
POINTS = f"Points of accuracy lost, mean ± half of a 95% interval over networks (below {SHOWN}: the value of each)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    runner = parts.add_parser("run")
    runner.add_argument("checkpoint")
    runner.add_argument("--without-repair", action="store_true", help="for networks without BatchNorm")
    runner.add_argument("--curves", nargs="*", choices=CURVES, default=list(CURVES))
    pager = parts.add_parser("page")
    pager.add_argument("runs", type=Path, nargs="?", help="the folder of paths.runs; without it the kept rows alone")
    options, words = parser.parse_known_args()
    if options.part == "run":
        sys.exit(run(options.checkpoint, list(chains_of(options.curves, options.without_repair)), words))
    if words:
        pager.error(f"unknown words {' '.join(words)}")
    if options.runs is not None:
        for path, file in ((ROWS, CHAIN_ROWS), (SPEEDS, CHAIN_SPEED)):
            kept(path, list(collected(options.runs, file)))
    speeds = pl.read_parquet(SPEEDS) if SPEEDS.exists() else pl.DataFrame(schema=TIMED)  # where none were taken
    write_below(PAGE, MARK, "Chains", page(pl.read_parquet(ROWS), speeds))


def chains_of(curves: Sequence[str], without_repair: bool) -> Iterator[str]:
    for chain in (chain for name in curves for chain in CURVES[name]):
        yield chain.replace(" > repair", "") if without_repair else chain


def run(checkpoint: str, chains: Sequence[str], words: Sequence[str]) -> int:
    """Exit code of scripts.compress on this checkpoint."""
    quoted = json.dumps(list(chains))
    command = [sys.executable, "-m", "scripts.compress", f"checkpoint={checkpoint}", f"chains={quoted}"]
    return subprocess.run([*command, *words]).returncode


def collected(runs: Path, file: str) -> Iterator[pl.DataFrame]:
    """The rows of this file in every cell of the folder, with the name of the network. No path of a machine is kept."""
    for folder in cells(runs):
        record = read_record(folder)
        if record is None or not (folder / file).exists():
            continue
        checkpoint = Path(record["config"]["checkpoint"])
        name = checkpoint.parent.name if checkpoint.stem == "last" else checkpoint.stem
        found = read(folder / file) if file == CHAIN_ROWS else pl.read_parquet(folder / file)
        yield found.with_columns(network=pl.lit(name)).drop("cell")


def kept(path: Path, found: list[pl.DataFrame]) -> None:
    """Write the rows to the file; those of a network that it has already are replaced."""
    if not found:
        return
    new = pl.concat(found, how="diagonal_relaxed")
    old = [pl.read_parquet(path).join(new, on="network", how="anti")] if path.exists() else []
    pl.concat([*old, new], how="diagonal_relaxed").sort("network", maintain_order=True).write_parquet(path)


# --- the page


def page(rows: pl.DataFrame, speeds: pl.DataFrame) -> list[str]:
    found = lost(rows, speeds)
    networks = found.unique("network").sort("model", "network")
    named = ", ".join(
        f"{row['model']} {row['network']} ({row['whole']:.1f}%)" for row in networks.iter_rows(named=True)
    )
    plot(found, PAGE.with_suffix(".png"))
    return [
        f"{len(networks)} networks, {found['n'].max():,} test pictures: {named}.",
        "",
        "## Every chain",
        "",
        f"{POINTS}; the other columns are means. Seconds are those of all stages.",
        "",
        *every(found),
        "",
        f"![accuracy lost over size]({PAGE.stem}.png)",
        "",
        "## At equal bytes",
        "",
        f"{POINTS}, on the straight line between the neighbouring points of a curve over the logarithm of the bytes; "
        "nothing where a network's curve does not reach so far.",
        "",
        *equal(found, "smaller", SMALLER, "times smaller"),
        "",
        f"## At equal bytes: points more than `{BESIDE}` keeps, network by network",
        "",
        *against(found),
        *(line for runtime in RUNTIMES.values() for line in at_time(found, runtime)),
    ]


def lost(rows: pl.DataFrame, speeds: pl.DataFrame) -> pl.DataFrame:
    """A line for each network and chain of CURVES: loss in points; smaller, fewer and times as multiples; whole in %.

    chain: as CURVES has it, also for a network without BatchNorm, whose chains have no repair.
    """
    done = rows.filter(pl.col("status") == "ok")
    whole = done.filter(pl.col("chain") == "").select("network", whole=100 * pl.col("acc"), large="bytes", all="macs")
    found = pl.concat(written(one) for one in done.partition_by("network")).join(whole, on="network")
    found = found.with_columns(
        loss=pl.col("whole") - 100 * pl.col("acc"),
        smaller=pl.col("large") / pl.col("bytes"),
        fewer=pl.col("all") / pl.col("macs"),
    )
    times = speeds.filter(pl.col("runtime") == "onnx", pl.col("speedup").is_not_nan())
    times = pl.concat([pl.DataFrame(schema=speeds.schema), *map(written, times.partition_by("network"))])
    for size, name in RUNTIMES.items():
        one = times.filter(pl.col("batch_size") == size).select("network", "chain", pl.col("speedup").alias(name))
        found = found.join(one, on=["network", "chain"], how="left")
    return found


def written(of_network: pl.DataFrame) -> pl.DataFrame:
    """The rows of the chains of CURVES and no others, under the names that CURVES has for them."""
    without_repair = not of_network["chain"].str.contains("repair").any()
    spelled = [spell_chain(parse_chain(chain)) for chain in chains_of(CURVES, without_repair)]  # as rows have them
    names = dict(zip(spelled, chains_of(CURVES, False), strict=True))
    return of_network.filter(pl.col("chain").is_in(names)).with_columns(pl.col("chain").replace_strict(names))


def curves(found: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """(name, lines of all networks), in the order of CURVES."""
    for name, chains in CURVES.items():
        if len(part := found.filter(pl.col("chain").is_in(chains))):
            yield name, part


def every(found: pl.DataFrame) -> list[str]:
    multiples = {"times smaller": "smaller", "MACs fewer": "fewer", **{name: name for name in RUNTIMES.values()}}
    multiples = {head: name for head, name in multiples.items() if found[name].is_not_null().any()}
    heads = ["lost", *multiples, "unlabelled", "seconds", "networks"]
    lines = [line("chain", heads), "|---" * (len(heads) + 1) + "|"]
    for name, part in curves(found):
        for chain in CURVES[name]:
            at = part.filter(pl.col("chain") == chain)
            if len(at):
                means = ("" if (value := at[name].mean()) is None else f"{value:.1f}" for name in multiples.values())
                costs = f"{at['unlabelled'].mean():,.0f}", f"{at['seconds'].mean():,.0f}"
                lines.append(line(chain, [*spread(at["loss"].to_numpy()), *means, *costs, str(len(at))]))
    return lines


def spread(values: np.ndarray) -> list[str]:
    """Mean and interval; below SHOWN networks, of which an interval says nothing, their values."""
    if len(values) < SHOWN:
        return [" and ".join(f"{value:.1f}" for value in values)]
    found = summary(values[:, None])
    return [f"{found.mean[0]:.1f} ± {found.half[0]:.1f}"]


def read_off(part: pl.DataFrame, axis: str, at: Sequence[float]) -> np.ndarray:
    """(networks, len(at)) losses of a curve at these multiples; NaN where a network's curve does not reach so far."""
    found = []
    for _, one in part.drop_nulls(axis).sort("network").group_by("network", maintain_order=True):
        one = one.sort(axis)
        x, y = np.log(one[axis].to_numpy()), one["loss"].to_numpy()
        found.append(
            np.interp(np.log(at), x, y, left=np.nan, right=np.nan) if len(one) > 1 else np.full(len(at), np.nan)
        )
    return np.array(found).reshape(-1, len(at))


def equal(found: pl.DataFrame, axis: str, at: Sequence[float], unit: str) -> list[str]:
    lines = [line(unit, [f"{value:g}" for value in at]), "|---" * (len(at) + 1) + "|"]
    for name, part in curves(found):
        values = read_off(part, axis, at)
        cells = [*map(cell, values.T)]
        if any(cells):
            lines.append(line(name, cells))
    return lines


def cell(values: np.ndarray) -> str:
    """The `spread` over networks, n where some are missing; empty where all are."""
    there = values[~np.isnan(values)]
    if not len(there):
        return ""
    (text,) = spread(there)
    return text if len(there) == len(values) else f"{text} ({len(there)})"


def against(found: pl.DataFrame) -> list[str]:
    of = dict(curves(found))
    beside = read_off(of[BESIDE], "smaller", SMALLER)
    lines = [line("times smaller", [f"{value:g}" for value in SMALLER]), "|---" * (len(SMALLER) + 1) + "|"]
    for name, part in of.items():
        values = read_off(part, "smaller", SMALLER)
        cells = [*map(cell, (beside - values).T)] if values.shape == beside.shape else []
        if name != BESIDE and any(cells):
            lines.append(line(name, cells))
    return lines


def at_time(found: pl.DataFrame, runtime: str) -> list[str]:
    """The same over the time of a pass: grids of fewer bits run as floats, so that only int8 files are faster."""
    table = equal(found, runtime, FASTER, "times as fast")
    return ["", f"## At equal time: {runtime}", "", f"{POINTS}.", "", *table] if len(table) > 2 else []


def plot(found: pl.DataFrame, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    place = figure.subplots()
    for number, (name, part) in enumerate(curves(found)):
        means = part.group_by("chain", maintain_order=True).agg(pl.col("smaller", "loss").mean()).sort("smaller")
        marker = "os^Dv"[number // 10]
        place.plot(means["smaller"], means["loss"], f"{marker}-", label=name, color=f"C{number % 10}", lw=1, ms=4)
    place.set_xscale("log", base=2)
    place.xaxis.set_major_formatter("{x:g}")
    place.set_yscale("symlog", linthresh=1)
    place.set_yticks([0, 0.5, 1, 2, 5, 10, 20, 50])
    place.yaxis.set_major_formatter("{x:g}")
    place.set_ylim(100, -0.5)
    place.set_xlabel("times smaller (file)")
    place.set_ylabel("points of accuracy lost")
    place.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
