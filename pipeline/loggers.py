"""W&B loggers that never ask for a key and whose failures never end a run."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger

from pipeline.tables import first_line

WANDB_MODES = ("auto", "online", "offline", "disabled")


class GuardedWandbLogger(WandbLogger):
    """A WandbLogger whose failures (server gone, disk full) become one warning: the run's folder has the rows, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # Lightning always passes this option on, and W&B warns that it is gone

    def _guarded(self, method: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            if not getattr(self, "_has_warned", False):
                self._has_warned = True
                text = f"W&B did not take what was logged ({first_line(error)}); training goes on"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._guarded(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        self._guarded(super().log_hyperparams, params)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self._guarded(super().log_table, *args, **kwargs)

    def finalize(self, status: str) -> None:
        self._guarded(super().finalize, status)

    def finish(self) -> None:
        self._guarded(self.experiment.finish)


def wandb_logger(
    folder: Path, project: str, name: str, config: Mapping[str, Any], mode: str, group: str | None = None
) -> WandbLogger | None:
    """A logger into `folder`. mode: online, offline, disabled, or auto: online for those logged in, else offline.

    The W&B run's id is the run's name, so that a resumed run goes on where it was.
    """
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    if mode == "disabled":
        return None
    settings = wandb.Settings(silent=True, console="off", mode=mode, init_timeout=30)
    make = {"name": name, "save_dir": folder, "config": dict(config), "settings": settings}
    if "WANDB_SWEEP_ID" not in os.environ:  # an agent of a W&B sweep sets id and project of its runs itself
        make |= {"project": project, "id": name, "group": group, "resume": "allow"}
    logger = GuardedWandbLogger(**make)
    try:
        run = logger.experiment
    except Exception as error:
        text = f"W&B cannot be reached ({first_line(error)}); this run logs offline"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        settings.mode = "offline"
        logger = GuardedWandbLogger(**make)
        run = logger.experiment
    # Curves over epochs instead of over optimizer steps.
    for prefix in ("compress", "compress_test", "foldability", "foldability_test"):
        run.define_metric(f"{prefix}/*", step_metric="epoch")
    return logger


def close(loggers: Iterable[Logger]) -> None:
    """End W&B runs, which Lightning leaves open, so that the next run of this process gets one of its own."""
    for logger in loggers:
        if isinstance(logger, GuardedWandbLogger):
            logger.finish()
