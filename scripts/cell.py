"""One cell, whoever runs it: skipped when done, held while it runs, recorded however it ends."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from pipeline.cells import Busy, held, read_record, write_record
from pipeline.tables import UserError, one_line
from scripts.build import Config, cell_of, check, resolved
from scripts.sweep import write_job

# Builds, from the config and the cell's folder, everything that a config can get wrong; returns what is left to do.
Begin = Callable[[Config, Path, bool], Callable[[], Any]]


def launch(config: DictConfig, run: Callable[..., Any]) -> None:
    """`run(config, sweeping)` as Hydra's job: of a sweep, where a failure stops nobody, or alone."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return in_sweep(config, run)
    try:
        run(resolved(config))
    except UserError as error:
        sys.exit(f"error: {error}")


def in_sweep(config: DictConfig, run: Callable[..., Any]) -> None:
    """A cell that fails must not stop the others: its record and the sweep's job file say why."""
    os.chdir(HydraConfig.get().runtime.cwd)  # workers of a cluster start elsewhere
    try:
        plain = resolved(config)
        write_job(cell_of(plain), skipped=is_done(folder_of(plain)))
        run(plain, sweeping=True)
    except Busy:
        pass  # of another sweep, which sees to it
    except Exception as error:
        write_job("", reason=one_line(error))


def run_cell(config: Config, begin: Begin, report: Callable[[Path], None], sweeping: bool = False) -> Path:
    """Do what the config says unless it is done; show it with `report`; returns the cell's folder.

    sweeping: one cell of many: shows nothing, and a failure is recorded even if nothing was started
    """
    check(config)
    folder, show = folder_of(config), (lambda folder: None) if sweeping else report
    record = read_record(folder)
    if record and record["state"] == "done":
        if not sweeping:
            print(f"{folder.name} is done already; delete its folder to run it again")
        show(folder)
        return folder
    start = time.perf_counter() - (record["seconds"] if record else 0.0)
    first = rank_zero_only.rank == 0
    try:
        work = begin(config, folder, sweeping)
        # Whatever the config can get wrong has been refused by now.
        with held(folder) if first else nullcontext():
            write_record(folder, config, "running", seconds=time.perf_counter() - start)
            (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
            work()
            if first:
                write_record(folder, config, "done", seconds=time.perf_counter() - start)
                show(folder)
    except Exception as error:
        if (sweeping or folder.exists()) and not isinstance(error, Busy):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text(traceback.format_exc())
            write_record(folder, config, "failed", one_line(error), time.perf_counter() - start)
        raise
    return folder


def folder_of(config: Config) -> Path:
    return Path(config["paths"]["runs"]).absolute() / cell_of(config)


def is_done(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record["state"] == "done"
