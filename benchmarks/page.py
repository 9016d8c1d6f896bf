"""What the page of a large sweep costs: seconds and memory to write it, its size, and how soon a browser draws it.

python -m benchmarks.page

Makes folders of 1,000 and 10,000 cells of 60 rows in a temporary directory, 2,000 recipes in five seeds, with values
drawn at random; writes their reports as `python -m scripts.report` does, in a process of its own; then opens each page
in Chromium. The files have just been written, so they are in the system's cache. Writes benchmarks/results/page.json.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.common import alone, described, machine, peak_mib, rounded, spent, timed
from benchmarks.report import config, rows
from pipeline.cells import write_record
from pipeline.results import ROWS, SCHEMA, RowStore
from pipeline.study.page.families import families
from pipeline.study.page.files import write_report
from pipeline.study.sweep import load

COUNTS = (1_000, 10_000)
SEEDS = 5
GRID = {
    "lr": (0.2, 0.1, 0.05, 0.01, 0.001),
    "decay": (0.0, 1e-4, 5e-4, 1e-3),
    "l1": (0.0, 1e-6, 1e-5, 5e-5, 1e-4),
    "rho": (0.0, 0.02, 0.05, 0.1, 0.2),
}
SMOOTHING = (0.0, 0.05, 0.1, 0.2)
OUT = Path(__file__).parent / "results" / "page.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    found = {"machine": machine("polars", "plotly"), "pages": [measured(count) for count in args.cells]}
    print(described(found["machine"], "polars", "plotly"))
    args.out.write_text(json.dumps(rounded(found), indent=1) + "\n")


def measured(count: int) -> dict[str, Any]:
    """The costs of a page of `count` cells, which are printed, too."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), count)
        cost = alone("page:written", folder)
        page = Path(folder) / "report" / "index.html"
        cost = {"cells": count, **cost, "page_mb": page.stat().st_size / 1e6, **opened(page)}
    print(", ".join(f"{name} {value:,.4g}" for name, value in cost.items()), flush=True)
    return cost


def make(runs: Path, count: int) -> None:
    """`count` cells of a grid of five settings and SEEDS seeds, 60 rows each."""
    rng = random.Random(0)
    grid = product(range(SEEDS), SMOOTHING, *GRID.values())
    for index, (seed, smoothing, lr, decay, l1, rho) in zip(range(count), grid, strict=False):
        name = f"resnet18_sgd_cifar10-{index:010x}"
        store = RowStore(runs / name / ROWS)
        store.add(rows(name, seed, rng))
        store.write()
        write_record(
            runs / name, config(lr, decay, l1, rho, seed) | {"label_smoothing": smoothing}, "done", seconds=1.0
        )


def written(folder: str) -> dict[str, float]:
    """Seconds and memory from the folder of cells to all files of the report. peak_mib: of the process, as a whole."""
    runs = Path(folder)
    reading, sweep = timed(lambda: load(runs, tuple(SCHEMA), warnings.warn))
    cost, _ = spent(lambda: write_report(runs / "report", runs, sweep, families(sweep), pl.DataFrame()))
    return {"read_s": reading, "write_s": cost["wall_s"], "write_cpu_s": cost["cpu_s"], "peak_mib": peak_mib()}


def opened(page: Path) -> dict[str, float]:
    """Seconds until Chromium has drawn the first picture, and until a filter that was clicked has drawn it anew."""
    from playwright.sync_api import sync_playwright

    binary = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1366, "height": 768})
        tab.goto("about:blank")
        first, _ = timed(lambda: (tab.goto(page.as_uri()), tab.wait_for_selector("#curves .main-svg .trace")))
        box = tab.locator("input[name=setting-0]").first
        again, _ = timed(lambda: (box.uncheck(), tab.evaluate("new Promise(requestAnimationFrame)")))
        browser.close()
    return {"first_picture_s": first, "filter_s": again}


if __name__ == "__main__":
    main()
