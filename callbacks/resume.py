"""An exact resume needs more than Lightning's checkpoint: the random state of an epoch, and a file that is whole."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from pipeline.tables import UserError


class EpochSeed(Callback):
    """Every epoch's randomness (shuffling, augmentation, dropout) follows from (seed, epoch, process) alone.

    Lightning's checkpoints hold no random state, so a resumed run would see other batches than an uninterrupted one.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self._drawn = seed, 0

    # Lightning makes the first epoch's iterator, which draws, before on_train_epoch_start: as soon as a schedule asks
    # for the number of steps. So the seed is set here, and again when a checkpoint says that training is further on.
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.draw(trainer, 0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # checkpoint["epoch"] is not used, because it depends on the hook that wrote the checkpoint
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


def latest_checkpoint(folder: str | Path, every_n_steps: int | None = None) -> list[ModelCheckpoint]:
    """Callbacks that keep `folder`/last.ckpt of the newest epoch, written after all that the epoch measures.

    every_n_steps: also write it after so many steps within an epoch, for data that go on in the middle of one (texts).

    save_last=True with save_top_k=0 is not used, because it writes only when training has ended.
    """
    if every_n_steps is not None and every_n_steps < 1:
        raise UserError(f"save_every_n_steps {every_n_steps} must be at least 1, or null for never within an epoch")
    options: dict[str, Any] = {"filename": "last", "save_top_k": 1, "enable_version_counter": False}
    of_steps = [ModelCheckpoint(folder, every_n_train_steps=every_n_steps, **options)] if every_n_steps else []
    return [*of_steps, ModelCheckpoint(folder, save_on_train_epoch_end=True, **options)]


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes the new checkpoint beside the old one and then replaces it, so a killed process leaves a whole one.

    Lightning's own writer goes through the system's temporary folder, and a move between file systems is a copy, which
    a kill can cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, part)
        os.replace(part, path)
