"""A progress bar that shows what compression left of the accuracy at the last measurement."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class CompressionProgressBar(TQDMProgressBar):
    """Adds `fold@0.5 81.2` for every method: the accuracy in % at one ratio, in the last stage measured."""

    def __init__(self, methods: list[str], ratio: float, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate)
        self.methods, self.ratio = methods, ratio

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        for method in self.methods:
            accuracies = [
                value
                for name, value in trainer.callback_metrics.items()
                if name.startswith(f"compress/{method}/r{self.ratio:g}/acc_")
            ]
            if accuracies:
                shown[f"{method}@{self.ratio:g}"] = f"{100 * float(accuracies[-1]):.1f}"
        return shown
