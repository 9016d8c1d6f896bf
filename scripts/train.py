"""Train a network, measure after every epoch what compression leaves of it, and show it.

python -m scripts.train experiment=quickstart
"""

import logging
import shutil
import sys
import warnings
from pathlib import Path

import hydra
import lightning
import polars as pl
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from pipeline.loggers import close
from pipeline.study import dense_accuracy, last_measurement, plot_curves, print_table
from pipeline.tables import UserError
from scripts.build import Config, build_compression, build_data, build_task, build_trainer, cell_of, resolved


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")
def main(config: DictConfig) -> None:
    try:
        run(resolved(config))
    except UserError as error:
        sys.exit(f"error: {error}")


def run(config: Config) -> Path:
    """Train and measure as the config says; returns the folder with everything that came of it."""
    quiet()
    cell = cell_of(config)
    folder = Path(config["paths"]["runs"]).absolute() / cell
    lightning.seed_everything(config["seed"], verbose=False)
    data = build_data(config)
    task = build_task(config, data)
    compression = build_compression(config, cell, folder)
    # Whatever the config can get wrong has been refused by now. The same config and code give the same results.
    if rank_zero_only.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    trainer = build_trainer(config, cell, folder, compression)
    try:
        if trainer.is_global_zero:
            print(f"{cell}: {len(data.train_data):,} pictures to train on, {len(data.val_data):,} to validate")
        trainer.fit(task, data)
        trainer.test(task, data, verbose=False)
        if trainer.is_global_zero:
            report(folder, compression.rows)
    finally:
        close(trainer.loggers)
    return folder


def report(folder: Path, rows: pl.DataFrame) -> None:
    """The last measurement on the terminal and as a picture, and where everything is."""
    rows = last_measurement(rows)
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
    warnings.filterwarnings("ignore", ".*number of training batches.*log.*")
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")


if __name__ == "__main__":
    main()
