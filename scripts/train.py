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
from omegaconf import DictConfig, OmegaConf

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
    if folder.exists():
        shutil.rmtree(folder)  # the same config and code give the same results
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))

    lightning.seed_everything(config["seed"], verbose=False)
    data = build_data(config)
    task = build_task(config, data)
    compression = build_compression(config, cell, folder)
    trainer = build_trainer(config, cell, folder, compression)
    print(f"{cell}: {len(data.train_data):,} training, {len(data.val_data):,} validation, {len(data.test_data):,} test")
    trainer.fit(task, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    trainer.test(task, data, verbose=False)

    if trainer.is_global_zero:
        report(folder, compression, task)
    return folder


def report(folder: Path, compression, task) -> None:
    rows = last_measurement(compression.rows)
    accuracy = dense_accuracy(rows)
    n = rows["n"].max()
    print(f"\nTest accuracy {100 * accuracy:.2f}% before compression.")
    title = f"Accuracy (%) on {n:,} {rows['split'][0]} pictures after compression, epoch {rows['epoch'][0]}"
    print_table(rows, title)
    plot_curves(rows, folder / "curves.png", f"{folder.name}: {rows['model'][0]} on {rows['data'][0]}, n = {n:,}")
    print(f"rows.parquet, curves.png, config.yaml, metrics.csv and last.ckpt are in {folder}")


def quiet() -> None:
    """Only what a user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*number of training batches.*log.*")
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")


if __name__ == "__main__":
    main()
