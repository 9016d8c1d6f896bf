"""Train a network, measure after every epoch what compression leaves of it, and show it.

python -m scripts.train experiment=quickstart
python -m scripts.train sweep=resnet18_adam_cifar10 launcher=ray
"""

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from omegaconf import DictConfig

from pipeline.loggers import close
from pipeline.tables import UserError, one_line
from scripts.arguments import checked, refuse
from scripts.build import (
    Config,
    build_compression,
    build_data,
    build_shrink,
    build_task,
    build_throughput,
    build_trainer,
    check_validation,
)
from scripts.cell import launch, run_cell
from scripts.sweep import check_launcher

CHECKPOINT = "last.ckpt"


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")
def main(config: DictConfig) -> None:
    launch(config, run)


def run(config: Config, sweeping: bool = False) -> Path:
    """Train and measure as the config says; returns the folder of the results.

    A cell that is done is shown and not run again; a cell that was cut off goes on from its last epoch.
    """
    quiet()
    return run_cell(config, begin, f", metrics/ and {CHECKPOINT}", sweeping)


def begin(config: Config, folder: Path, sweeping: bool) -> Callable[[], None]:
    """Build everything; returns the training."""
    lightning.seed_everything(config["seed"], verbose=False)
    data = build_data(config)
    task = build_task(config, data)
    check_validation(config, data)
    compression = build_compression(config, folder.name, folder, data)
    more = [*build_shrink(config, folder, data), *build_throughput(data)]

    def train() -> None:
        trainer = build_trainer(config, folder.name, folder, compression, more, quiet=sweeping)
        try:
            checkpoint = resumable(folder / CHECKPOINT)
            if trainer.is_global_zero and not sweeping:
                counts = f"{len(data.train_data):,} {data.unit} to train on, {len(data.val_data):,} to validate"
                print(f"{folder.name}: {counts}" + (", going on from the last epoch" if checkpoint else ""))
            trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
            # The test is of the weights in the file, which with EMA are the averaged ones, also where no epoch was left
            # to train. ckpt_path= cannot load them, because Lightning's averaging would put the live weights back.
            task.load_state_dict(load(folder / CHECKPOINT)["state_dict"])
            trainer.test(task, data, verbose=False)
        finally:
            close(trainer.loggers)

    return train


def resumable(checkpoint: Path) -> Path | None:
    """The checkpoint if it is whole; None where it is absent or damaged."""
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


def quiet() -> None:
    """Silence logs and warnings that a user cannot act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the place in the code
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*number of training batches.*log.*")
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero.*")  # data.val_fraction=0
    warnings.filterwarnings("ignore", "Corrupt EXIF data")  # a camera's mistake; the pixels are whole


def start(arguments: list[str]) -> Any:
    try:
        sys.argv[1:] = checked(arguments, "train")
    except UserError as error:
        refuse(error)
    check_launcher(sys.argv)
    return main()


if __name__ == "__main__":
    # Imported by its module's name, so that a cluster's workers can import the function, too.
    from scripts.cli import main as command

    command(["train", *sys.argv[1:]])
