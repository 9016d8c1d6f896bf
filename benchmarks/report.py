"""How long reading a large sweep takes: 10,000 cells of 60 rows, one small Parquet file each.

python -m benchmarks.report

Makes such a folder in a temporary directory, with rows of RowStore and records of write_record, then times the work
that `python -m scripts.report` does before it prints: median of 5. The files have just been written, so they are in the
system's cache; the start of Python and its imports are not counted.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.common import described, machine, timed
from pipeline.cells import cells, settings, write_record
from pipeline.results import ROWS, Row, RowStore, facts_of_label, means, read_present
from pipeline.study.summary import gaps, headlines, last_measurement
from pipeline.study.sweep import COLUMNS, load

METHODS = ("fold", "l1", "l2")
RATIOS = [r / 10 for r in range(1, 10)]
STAGES = ("raw", "repaired")
REPEATS = 5
facts = cache(facts_of_label)  # columns that every row has today


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        make(runs, args.cells)
        measure(runs)


def make(runs: Path, count: int) -> None:
    """`count` cells of a grid over optimizers, 60 rows each."""
    rng = random.Random(0)
    grid = product(range(count), (0.1, 0.05, 0.01, 0.001), (0.0, 5e-4, 1e-3), (0.0, 1e-5), (0.0, 0.05, 0.1))
    for index, (seed, lr, decay, l1, rho) in zip(range(count), grid, strict=False):
        name = f"resnet18_sgd_cifar10-{index:010x}"
        store = RowStore(runs / name / ROWS)
        store.add(rows(name, seed, rng))
        store.write()
        write_record(runs / name, config(lr, decay, l1, rho, seed), "done", seconds=5000 * rng.random())


def rows(cell: str, seed: int, rng: random.Random) -> list[Row]:
    """60 rows: nine ratios, three methods, two stages of the test set, and six of the dense network over time."""
    fixed = {
        "cell": cell,
        "model": "resnet18",
        "data": "cifar10",
        "seed": seed,
        "n": 10_000,
        "version": "0.1.0+g12ab34c",
    }
    dense = {**fixed, "method": "dense", "ratio": 0.0, "stage": "raw", "params": 11_173_962, "macs": 555_422_720}
    found = [
        Row(**dense, epoch=e, step=390 * e, split="test" if e == 200 else "val", acc=rng.random(), loss=rng.random())
        for e in (40, 80, 120, 160, 180, 200)
    ]
    found = [replace(row, **facts(row.method, row.stage)) for row in found]
    for method, ratio, stage in product(METHODS, RATIOS, STAGES):
        measures = {name: rng.random() for name in ("acc", "loss", "error", "seconds")}
        size = {"params": int(11_173_962 * (1 - ratio) ** 2), "macs": int(555_422_720 * (1 - ratio) ** 2)}
        what = {"method": method, "ratio": ratio, "stage": stage, "split": "test", "epoch": 200, "step": 78_000}
        found.append(Row(**fixed, **what, **measures, **size, **facts(method, stage)))
    return found


def config(lr: float, decay: float, l1: float, rho: float, seed: int) -> dict[str, Any]:
    """A resolved config as train.py records it."""
    return {
        "name": "resnet18_sgd_cifar10",
        "seed": seed,
        "label_smoothing": 0.0,
        "model": {"name": "resnet18", "width": 64},
        "data": {
            "name": "cifar10",
            "root": "data/cifar10",
            "batch_size": 128,
            "val_fraction": 0.1,
            "augment": ["crop", "flip"],
            "size": None,
        },
        "optim": {
            "name": "sgd",
            "lr": lr,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": decay,
            "l1": l1,
            "sam": {"rho": rho, "adaptive": False},
            "schedule": {"name": "cosine", "warmup": 0.0},
        },
        "compression": {
            "methods": list(METHODS),
            "ratios": RATIOS,
            "stages": list(STAGES),
            "every_n_epochs": 40,
            "repair_size": 2048,
            "save": False,
        },
        "trainer": {"max_epochs": 200, "accelerator": "auto", "devices": 1, "precision": "32-true"},
        "paths": {"runs": "runs"},
        "wandb": {"mode": "auto", "project": "foldability"},
    }


def measure(runs: Path) -> None:
    folders = cells(runs)
    files = [folder / ROWS for folder in folders]
    found = read_present(files)
    where = described(machine("polars"), "polars")
    print(f"{where}; n = {len(folders):,} cells, {len(found):,} rows, median of {REPEATS}")
    last = last_measurement(found)
    clocked("list, settings and states", lambda: settings(runs))
    clocked("rows that the tables need", lambda: read_present(files, COLUMNS))
    clocked("rows, every column (--out)", lambda: read_present(files))
    clocked("pivot: last measurement, means, gaps", lambda: tables(found))
    clocked("of that, means", lambda: means(last))
    clocked("all of a report before printing", lambda: whole(runs))


def tables(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    last = last_measurement(rows)
    return means(last), gaps(last)


def whole(runs: Path) -> None:
    sweep = load(runs)
    sweep.differing()
    headlines(sweep.rows)
    tables(sweep.rows)


def clocked(what: str, run: Callable[[], Any]) -> None:
    """Print wall seconds, their range, and processor seconds, which other programs on the machine disturb less."""
    seconds, busy = [], []
    for _ in range(REPEATS):
        used = time.process_time()
        spent, _ = timed(run)
        seconds.append(spent)
        busy.append(time.process_time() - used)
    spread = f"{min(seconds):.2f} ... {max(seconds):.2f}"
    print(
        f"{what:<38} {statistics.median(seconds):6.2f} s   ({spread}; processor {statistics.median(busy):.2f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
