"""How far a training is and what compression left at last: a bar on a terminal, elsewhere a line an epoch."""

import sys
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from pipeline.metrics import METRICS, Metric


def progress(methods: list[str], ratio: float) -> Callback:
    """The one of the two that suits the terminal. ratio: at which it shows what every method leaves"""
    return CompressionProgressBar(methods, ratio) if sys.stderr.isatty() else EpochLines(methods, ratio)


def left(trainer: Trainer, methods: list[str], ratio: float) -> dict[str, str]:
    """{"fold@0.5": "81.2"} for every method: the headline in the last stage measured."""
    found = {}
    for method in methods:
        logged = f"compress/{method}/r{ratio:g}/"
        values = {n.removeprefix(logged): v for n, v in trainer.callback_metrics.items() if n.startswith(logged)}
        if values:
            name, value = list(values.items())[-1]
            metric = next(metric for metric in METRICS.values() if name.startswith(f"{metric.name}_"))
            found[f"{method}@{ratio:g}"] = metric.short(float(value)).strip()
    return found


class CompressionProgressBar(TQDMProgressBar):
    """Lightning's bar, and what compression left."""

    def __init__(self, methods: list[str], ratio: float, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate)
        self.methods, self.ratio = methods, ratio

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return shown | left(trainer, self.methods, self.ratio)


class EpochLines(Callback):
    """One line an epoch, with the time that the rest will take at the pace so far: logs keep no bars.

    epoch 3 of 8: loss 0.412, val accuracy 91.2%, fold@0.5 81.2; 12 s, about 1 min to go
    """

    def __init__(self, methods: list[str], ratio: float) -> None:
        self.methods, self.ratio = methods, ratio
        self.start, self.first = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start, self.first = time.perf_counter(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs
        spent = (time.perf_counter() - self.start) / max(1, done - self.first)
        shown = {**measured(trainer), **left(trainer, self.methods, self.ratio)}
        of = f" of {epochs}" if epochs and epochs > 0 else ""
        rest = f", about {duration(spent * (epochs - done))} to go" if of and epochs and epochs > done else ""
        told = ", ".join(f"{name} {value}" for name, value in shown.items())
        print(f"epoch {done}{of}: {told}; {duration(spent)}{rest}", flush=True)


def measured(trainer: Trainer) -> dict[str, str]:
    """The training loss and the headline of validation, as people read them."""
    found = {"loss": f"{float(trainer.callback_metrics['train/loss']):.3f}"} if has(trainer, "train/loss") else {}
    headline = next((metric for metric in METRICS.values() if has(trainer, name_of(metric))), None)
    if headline is not None:
        found[f"val {headline.title}"] = headline.text(float(trainer.callback_metrics[name_of(headline)]))
    return found


def has(trainer: Trainer, name: str) -> bool:
    return name in trainer.callback_metrics


def name_of(metric: Metric) -> str:
    return f"val/{metric.name}"


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
