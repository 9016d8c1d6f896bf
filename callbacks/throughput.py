"""Logs how many tokens a second a training reads."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops

from pipeline.tasks.language import token_ids


class Throughput(Callback):
    """Logs train/tokens_per_second over all processes, and on a known GPU train/mfu, without the time of validation.

    mfu: floating-point operations, 6 for each parameter and token (arXiv:2001.08361), as a share of what the GPU could
        do in the precision of the training
    """

    def __init__(self) -> None:
        self.tokens, self.seconds, self.since = 0, 0.0, 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokens, self.seconds, self.since = 0, 0.0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += token_ids(batch).numel()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop(trainer)
        speed = self.tokens / self.seconds
        pl_module.log("train/tokens_per_second", speed * trainer.world_size, rank_zero_only=False, sync_dist=False)
        if (possible := peak(trainer)) is not None:
            done = 6 * sum(p.numel() for p in pl_module.parameters()) * speed
            pl_module.log("train/mfu", done / possible, rank_zero_only=False, sync_dist=False)

    def stop(self, trainer: Trainer) -> None:
        """Add the time since training went on, with all that the device still does for it."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self.seconds += time.perf_counter() - self.since


def peak(trainer: Trainer) -> float | None:
    """Operations a second of this process's GPU; None where they are not known."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    half = {"bf16": torch.bfloat16, "16": torch.float16}
    return get_available_flops(device, half.get(str(trainer.precision).split("-")[0], torch.float32))
