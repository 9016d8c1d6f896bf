"""A progress bar that shows what compression left at the last measurement."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from pipeline.tasks import METRICS


class CompressionProgressBar(TQDMProgressBar):
    """Adds `fold@0.5 81.2` for every method: the headline at one ratio, in the last stage measured."""

    def __init__(self, methods: list[str], ratio: float, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate)
        self.methods, self.ratio = methods, ratio

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        for method in self.methods:
            logged = f"compress/{method}/r{self.ratio:g}/"
            found = {n.removeprefix(logged): v for n, v in trainer.callback_metrics.items() if n.startswith(logged)}
            if found:
                name, value = list(found.items())[-1]
                metric = next(metric for metric in METRICS.values() if name.startswith(f"{metric.name}_"))
                shown[f"{method}@{self.ratio:g}"] = metric.short(float(value)).strip()
        return shown
