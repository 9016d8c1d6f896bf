"""Runs one cell: skips it when it is done, holds it while it runs, and records how it ends."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from callbacks.shrink import TUNED
from pipeline.cells import Busy, held, read_record, write_record
from pipeline.compression.checkpoint import read_manifest
from pipeline.results import ROWS, SPEED, headline, read, read_speeds
from pipeline.study.pictures import plot_curves
from pipeline.study.summary import dense_value, last_measurement
from pipeline.study.terminal import print_speeds, print_table, verdict
from pipeline.tables import UserError, one_line
from scripts.arguments import refuse
from scripts.config import Config, check, resolved
from scripts.naming import cell_of
from scripts.stop import Stopped
from scripts.sweep import write_job

# (config, the cell's folder, sweeping) -> the work to do. Building everything first refuses a wrong config early.
Begin = Callable[[Config, Path, bool], Callable[[], Any]]


def launch(config: DictConfig, run: Callable[..., Any]) -> None:
    """`run(config, sweeping)` as Hydra's job: alone, or one of a sweep, where a failure does not stop the others."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return in_sweep(config, run)
    try:
        run(resolved(config))
    except UserError as error:
        refuse(error)


def in_sweep(config: DictConfig, run: Callable[..., Any]) -> None:
    """Run a cell of a sweep. A cell that fails does not stop the others: its record and its job file say why."""
    os.chdir(HydraConfig.get().runtime.cwd)  # workers of a cluster start elsewhere
    try:
        plain = resolved(config)
        folder = folder_of(plain)
        write_job(folder.name, skipped=is_done(read_record(folder)))
        run(plain, sweeping=True)
    except Busy:
        pass  # another sweep runs this cell and will record it
    except Exception as error:
        write_job("", reason=one_line(error))


def run_cell(
    config: Config,
    begin: Begin,
    files: str = "",
    sweeping: bool = False,
    again: bool = False,
    show: Callable[[Path, str], None] | None = None,
) -> Path:
    """Run the cell of this config unless it is done, and show the result; returns the cell's folder.

    files: names of the files that the cell's folder holds beside rows, curves and config, for the last line shown
    sweeping: one cell of many: shows nothing, and a failure is recorded even if nothing was started
    again: run a cell that is done, too, because its work finds out by itself what is left to do
    show: shows the result of a folder; None: `show_rows`
    """
    check(config)
    folder = folder_of(config)
    record = read_record(folder)
    show = show or show_rows
    if is_done(record) and not again:
        if not sweeping:
            print(f"{folder.name} is done already; delete its folder to run it again")
            show(folder, files)
        return folder
    check_writable(folder)
    start = time.perf_counter() - (record["seconds"] if record else 0.0)
    first = rank_zero_only.rank == 0
    try:
        work = begin(config, folder, sweeping)
        # From here on the config is known to be right, so the cell may be recorded as running.
        with held(folder) if first else nullcontext():
            write_record(folder, config, "running", seconds=time.perf_counter() - start)
            (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
            work()
            if first:
                write_record(folder, config, "done", seconds=time.perf_counter() - start)
                if not sweeping:
                    show(folder, files)
    except Stopped as stopped:
        if first and folder.exists():
            write_record(folder, config, "interrupted", f"stopped by {stopped}", time.perf_counter() - start)
        raise
    except Exception as error:
        if (sweeping or folder.exists()) and not isinstance(error, Busy):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text(traceback.format_exc())
            write_record(folder, config, "failed", one_line(error), time.perf_counter() - start)
        raise
    return folder


def check_writable(folder: Path) -> None:
    """UserError where the folder of the runs cannot be made or written to; what is made to try it is taken away."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        with suppress(OSError):  # another cell of the sweep is in it by now
            for path in made:
                path.rmdir()
    except OSError as error:
        text = f"paths.runs {folder.parent} cannot be written to ({error.strerror})"
        raise UserError(f"{text}; choose another folder: paths.runs=...") from error


def folder_of(config: Config) -> Path:
    return Path(config["paths"]["runs"]).absolute() / cell_of(config)


def is_done(record: Mapping[str, Any] | None) -> bool:
    return record is not None and record["state"] == "done"


def show_rows(folder: Path, files: str) -> None:
    """Show the last measurement on the terminal and as a picture, and where the files are. files: as for `run_cell`."""
    rows = last_measurement(read(folder / ROWS))
    split, n, epoch = rows["split"][0], rows["n"].max(), rows["epoch"][0]
    samples, dense, metric = f"{n:,} {split} samples", dense_value(rows), headline(rows)
    record = read_record(folder)
    shrinks = record is not None and (record["config"].get("shrink") or {}).get("method") is not None
    # A run that made no network smaller has files of this name from the stage `tuned`.
    tuned = next((folder / "compressed").glob(f"*-{TUNED}.safetensors"), None) if shrinks else None
    if tuned is not None:
        made = read_manifest(tuned)
        left = f"{made['params'] / made['params_before']:.0%} of its parameters"
        print(f"\nMade smaller while it trained, by {made['method']} at ratio {made['ratio']:g}: {left}.")
    what = f"\nDense {metric.title}" if tuned is None else f"Its {metric.title}"
    finely = replace(metric, digits=metric.digits + 1)
    print(f"{what} {'could not be measured' if dense is None else finely.text(dense)} on {samples}.")
    when = f", epoch {epoch}" if epoch else ""  # 0: a checkpoint whose epoch is unknown
    print_table(rows, f"{metric.heading} that compression leaves, {split} samples{when}")
    if said := verdict(rows):
        print(said)
    plot_curves(rows, folder / "curves.png", f"{rows['model'][0]} on {rows['data'][0]}: {samples}")
    print_speeds(read_speeds([folder / SPEED]))
    kept = sorted((folder / "compressed").rglob("*.safetensors"))
    kept = [path for path in kept if not (path.parent / "config.json").exists()]  # no folders of Hugging Face
    if kept:
        size = f"{sum(path.stat().st_size for path in kept) / 1e6:,.1f} MB"
        print(f"Smaller networks, {len(kept)} in all, are in {folder.name}/compressed ({size}); to use one:")
        print(f"    from pipeline.compressed import load; model, manifest = load({str(kept[len(kept) // 2])!r})")
    print(f"rows.parquet, curves.png, config.yaml{files} are in {folder}")
