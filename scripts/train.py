"""Train a network, measure after every epoch what compression leaves of it, and show it.

python -m scripts.train experiment=quickstart
python -m scripts.train sweep=resnet18_adam_cifar10 launcher=ray
"""

import logging
import os
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from pipeline.cells import Busy, held, read_record, write_record
from pipeline.loggers import close
from pipeline.results import ROWS, read
from pipeline.study import dense_accuracy, last_measurement, plot_curves, print_table
from pipeline.tables import UserError, one_line
from scripts.build import Config, build_compression, build_data, build_task, build_trainer, cell_of, check, resolved
from scripts.sweep import check_launcher, write_job

CHECKPOINT = "last.ckpt"


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")
def main(config: DictConfig) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_in_sweep(config)
    try:
        run(resolved(config))
    except UserError as error:
        sys.exit(f"error: {error}")


def run_in_sweep(config: DictConfig) -> None:
    """A cell that fails must not stop the others: its record and the sweep's job file say why."""
    os.chdir(HydraConfig.get().runtime.cwd)  # workers of a cluster start elsewhere
    try:
        plain = resolved(config)
        record = read_record(folder_of(plain))
        write_job(cell_of(plain), skipped=record is not None and record["state"] == "done")
        run(plain, sweeping=True)
    except Busy:
        pass  # of another sweep, which sees to it
    except Exception as error:
        write_job("", reason=one_line(error))


def run(config: Config, sweeping: bool = False) -> Path:
    """Train and measure as the config says; returns the folder with everything that came of it.

    A cell that is done is shown and not run again; one that was cut off goes on from its last epoch.
    sweeping: one cell of many: no bars, no tables, and a failure is recorded even if nothing was started
    """
    quiet()
    check(config)
    folder = folder_of(config)
    record = read_record(folder)
    if record and record["state"] == "done":
        if not sweeping:
            print(f"{folder.name} is done already; delete its folder to run it again")
            report(folder)
        return folder
    start = time.perf_counter() - (record["seconds"] if record else 0.0)
    try:
        lightning.seed_everything(config["seed"], verbose=False)
        data = build_data(config)
        task = build_task(config, data)
        compression = build_compression(config, folder.name, folder)
        # Whatever the config can get wrong has been refused by now.
        with held(folder) if rank_zero_only.rank == 0 else nullcontext():
            write_record(folder, config, "running", seconds=time.perf_counter() - start)
            (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
            trainer = build_trainer(config, folder.name, folder, compression, quiet=sweeping)
            try:
                checkpoint = resumable(folder / CHECKPOINT)
                if trainer.is_global_zero and not sweeping:
                    counts = f"{len(data.train_data):,} pictures to train on, {len(data.val_data):,} to validate"
                    print(f"{folder.name}: {counts}" + (", going on from the last epoch" if checkpoint else ""))
                trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
                # From the file, which with EMA holds the averaged weights, also where there was no epoch left to train.
                # Not by ckpt_path: Lightning's averaging would put the live weights back.
                task.load_state_dict(load(folder / CHECKPOINT)["state_dict"])
                trainer.test(task, data, verbose=False)
            finally:
                close(trainer.loggers)
            if trainer.is_global_zero:
                write_record(folder, config, "done", seconds=time.perf_counter() - start)
                if not sweeping:
                    report(folder)
    except Exception as error:
        if (sweeping or folder.exists()) and not isinstance(error, Busy):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text(traceback.format_exc())
            write_record(folder, config, "failed", one_line(error), time.perf_counter() - start)
        raise
    return folder


def folder_of(config: Config) -> Path:
    return Path(config["paths"]["runs"]).absolute() / cell_of(config)


def resumable(checkpoint: Path) -> Path | None:
    """The checkpoint if there is a whole one."""
    if not checkpoint.exists():
        return None
    try:
        load(checkpoint)
    except Exception as error:
        warnings.warn(
            f"{checkpoint} is damaged ({one_line(error)}); the cell starts anew", RuntimeWarning, stacklevel=2
        )
        return None
    return checkpoint


def load(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def report(folder: Path) -> None:
    """The last measurement on the terminal and as a picture, and where everything is."""
    rows = last_measurement(read(folder / ROWS))
    split, n, epoch = rows["split"][0], rows["n"].max(), rows["epoch"][0]
    dense = dense_accuracy(rows)
    accuracy = "could not be measured" if dense is None else f"{100 * dense:.2f}%"
    print(f"\nDense accuracy {accuracy} on {n:,} {split} pictures.")
    print_table(rows, f"Accuracy (%) that compression leaves, {split} pictures, epoch {epoch}")
    plot_curves(rows, folder / "curves.png", f"{rows['model'][0]} on {rows['data'][0]}: {n:,} {split} pictures")
    print(f"rows.parquet, curves.png, config.yaml, metrics/ and last.ckpt are in {folder}")


def quiet() -> None:
    """Only what a user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*number of training batches.*log.*")
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")


if __name__ == "__main__":
    # By its own name, so that a cluster's workers can import what they are told to run.
    from scripts.train import main

    check_launcher(sys.argv)
    main()
