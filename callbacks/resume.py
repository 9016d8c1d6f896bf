"""What an exact resume needs beside Lightning's checkpoint: the random state of an epoch, and a file that is whole."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint


class EpochSeed(Callback):
    """Every epoch's randomness (shuffling, augmentation, dropout) follows from (seed, epoch, process) alone.

    Lightning's checkpoints hold no random state, so a resumed run would see other batches than an uninterrupted one.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self._drawn = seed, 0

    # The first epoch's iterator, which draws, is made long before the epoch is announced: when a schedule asks for
    # the number of steps. So its seed is set here, and again when a checkpoint says that it is another epoch.
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.draw(trainer, 0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # not checkpoint["epoch"], which depends on the hook that wrote it
        self.draw(trainer, checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > self._drawn:
            self.draw(trainer, trainer.current_epoch)

    def draw(self, trainer: Trainer, epoch: int) -> None:
        self._drawn = epoch
        (state,) = np.random.SeedSequence([self.seed, epoch, trainer.global_rank]).generate_state(1)
        random.seed(int(state))
        np.random.seed(state)
        torch.manual_seed(int(state))


def latest_checkpoint(folder: str | Path) -> ModelCheckpoint:
    """Keeps `folder`/last.ckpt of the newest epoch, written after everything that the epoch measures.

    Not save_last=True with save_top_k=0, which writes only when training has ended.
    """
    return ModelCheckpoint(
        folder, filename="last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the old checkpoint and replaces it: there is always a whole one, whenever the process is killed.

    Lightning's own writer goes through the system's temporary folder, and a move between file systems is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, part)
        os.replace(part, path)
