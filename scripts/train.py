"""Train a network, measure after every epoch what compression leaves of it, and show it.

python -m scripts.train experiment=quickstart
python -m scripts.train sweep=resnet18_adam_cifar10 launcher=ray
python -m scripts.train experiment=quickstart chain='mix+data@0.3 > repair > distil(epochs=5)'
"""

import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import nn

from callbacks.shrink import TUNED
from pipeline.cells import held
from pipeline.compression.copies import bare_copy
from pipeline.loggers import close
from pipeline.results import ROWS, read
from pipeline.stages import Traces
from pipeline.study.summary import last_measurement
from pipeline.tables import UserError, call, one_line
from scripts.arguments import checked, refuse
from scripts.build_callbacks import build_compression, build_shrink, build_throughput, check_validation
from scripts.build_data import build_data
from scripts.build_network import build_net
from scripts.build_training import build_task, build_trainer
from scripts.cell import launch, run_cell
from scripts.chain import chains_in, chosen_device, prepared, quoted_chains, timing_options
from scripts.chain import show as show_chains
from scripts.config import Config
from scripts.stop import run_stoppable
from scripts.sweep import check_launcher
from scripts.teachers import learning

CHECKPOINT = "last.ckpt"


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")
def main(config: DictConfig) -> None:
    launch(config, run)


def run(config: Config, sweeping: bool = False) -> Path:
    """Train and measure as the config says; returns the folder of the results.

    A cell that is done is shown and not run again; a cell that was cut off goes on from its last epoch.
    """
    quiet()
    chains = chains_in(config)  # a chain that is none is refused before the training
    folder = run_cell(config, begin, f", metrics/ and {CHECKPOINT}", sweeping)
    if chains and rank_zero_only.rank == 0:
        with held(folder):
            run_chains(config, folder, sweeping)
        if not sweeping:
            show_chains(folder)
    return folder


def run_chains(config: Config, folder: Path, sweeping: bool) -> None:
    """The chains, from the network that the training in this folder left."""
    smaller = next((folder / "compressed").glob(f"*-{TUNED}.safetensors"), None) if config["shrink"]["method"] else None
    checkpoint = {**config, "checkpoint": str(smaller or folder / CHECKPOINT)}
    data = build_data(config)
    last = last_measurement(read(folder / ROWS))
    place = {name: last[name][0] for name in ("epoch", "step")}
    prepared_chains(checkpoint, folder, data, build_net(checkpoint, data), sweeping, place)()


def prepared_chains(
    config: Config, folder: Path, data: LightningDataModule, net: nn.Module, sweeping: bool, place: Mapping[str, int]
) -> Callable[[], None]:
    device = chosen_device("cpu" if config["trainer"]["accelerator"] == "cpu" else "auto")
    timing = call("profile", timing_options, **config["profile"], kind=data.kind, sweeping=sweeping)
    net = net.to(memory_format=torch.channels_last)
    return prepared(config, folder, data, net, device, timing, place)


def begin(config: Config, folder: Path, sweeping: bool) -> Callable[[], None]:
    """Build everything; returns the training."""
    lightning.seed_everything(config["seed"], verbose=False)
    data = build_data(config)
    task = learning(build_task(config, data), config, data)
    check_validation(config, data)
    compression = build_compression(config, folder.name, folder, data)
    shrink = build_shrink(config, folder, data)
    traces = Traces()
    for callback in (compression, *shrink):  # at the start of the training the folder of the cell would be there
        callback.check(task.net, data.example, traces)
    more = [*shrink, *build_throughput(data)]
    if chains_in(config):  # tried on the network as it is built, so that nothing is trained for a chain that fails
        prepared_chains(config, folder, data, bare_copy(task.net), sweeping, {"epoch": 0, "step": 0})

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
        check_launcher(arguments)
        sys.argv[1:] = checked(quoted_chains(arguments), "train")
    except UserError as error:
        refuse(error)
    return run_stoppable(main)


if __name__ == "__main__":
    # Imported by its module's name, so that a cluster's workers can import the function, too.
    from scripts.cli import main as command

    command(["train", *sys.argv[1:]])
