"""Builds the LightningModule and the Trainer of a resolved config; the parts get plain arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.modules.batchnorm import _BatchNorm

from callbacks import CompressionCallback, EpochSeed
from callbacks.progress import progress
from callbacks.resume import WholeCheckpointIO, latest_checkpoint
from pipeline.cpu import has_bfloat16
from pipeline.loggers import wandb_logger
from pipeline.optim import build_schedule
from pipeline.tables import UserError, call, first_line
from pipeline.training import Training
from scripts.arguments import warn
from scripts.build_callbacks import rewound, shrink_pacing, training_length
from scripts.build_network import build_net, task_of
from scripts.config import Config, without
from scripts.labels import label_of
from scripts.naming import WHERE, recipe_of


def build_task(config: Config, data: LightningDataModule) -> Training:
    net = build_net(config, data)
    net = net.to(memory_format=torch.channels_last)  # convolutions train 1.7 times as fast on a CPU
    optim = config["optim"]
    loss = {key: optim[key] for key in ("l1", "l2", "sam", "decay")}
    loss |= {key: config[key] for key in ("label_smoothing", "compile")}
    restarts: list[float] = []
    if (pacing := shrink_pacing(config)) and rewound(config):
        length = training_length(config, data, pacing)
        restarts = [place / length for place in pacing.ratios]
    task = call(
        "optim",
        Training,
        net=net,
        task=task_of(config, data),
        optim=without(optim, "schedule", "l1", "l2", "sam", "ema", "decay"),
        schedule=optim["schedule"],
        restarts=restarts,
        **loss,
    )
    check_training(config, task)
    norms = [name for name, module in task.net.named_modules() if isinstance(module, _BatchNorm)]
    if norms and config["data"]["batch_size"] == 1:
        raise UserError(f"data.batch_size 1 gives BatchNorm ({norms[0]}) nothing to normalise over; take 2 or more")
    return task


def build_trainer(
    config: Config,
    cell: str,
    folder: Path,
    compression: CompressionCallback,
    more: Sequence[Callback] = (),
    quiet: bool = False,
) -> Trainer:
    """The Trainer of a run.

    more: callbacks that come before the one that compresses
    quiet: no progress bars, because those of many cells would overwrite each other
    """
    options = {**config["trainer"], "enable_progress_bar": config["trainer"]["enable_progress_bar"] and not quiet}
    callbacks: list[Callback] = [
        EpochSeed(config["seed"]),
        *more,
        compression,
        *call("checkpoints", latest_checkpoint, folder, config["save_every_n_steps"]),
    ]
    callbacks += call("optim", averaging, ema=config["optim"]["ema"])
    if options["enable_progress_bar"]:
        middle = min(compression.chains.ratios, key=lambda ratio: abs(ratio - 0.5))
        callbacks.append(progress(list(compression.chains.recipes), middle))
        options["enable_progress_bar"] = isinstance(callbacks[-1], ProgressBar)
    label = label_of(config, recipe_of(config), WHERE)
    loggers = [
        CSVLogger(folder, name="metrics"),  # a folder version_<n> for every start, resumed ones too
        call("wandb", wandb_logger, folder, cell, config, label, **config["wandb"]),
    ]
    trainer = lightning_trainer(
        **options,
        default_root_dir=folder,
        logger=[logger for logger in loggers if logger is not None],
        callbacks=callbacks,
        plugins=[WholeCheckpointIO()],
    )
    on_cpu = trainer.is_global_zero and trainer.strategy.root_device.type == "cpu"
    if on_cpu and trainer.precision.startswith("bf16") and not has_bfloat16():
        warn(f"this CPU has no bfloat16: {trainer.precision} takes about ten times as long as trainer.precision=32")
    return trainer


def lightning_trainer(**options: Any) -> Trainer:
    try:
        return call("trainer", Trainer, **options)
    except (MisconfigurationException, ModuleNotFoundError) as error:  # an accelerator whose library is not there
        raise UserError(f"trainer: {first_line(error)}") from error


def check_training(config: Config, task: Training) -> None:
    """UserError for settings that would otherwise be refused when the folder of the run is there already."""
    taken = {"callbacks", "logger", "default_root_dir", "plugins"} & set(config["trainer"])
    if taken:
        raise UserError(f"trainer.{min(taken)} is set by the script; the callbacks of a run follow from its config")
    call("optim", averaging, ema=config["optim"]["ema"])
    latest_checkpoint(".", config["save_every_n_steps"])
    build_schedule(task.build_optimizer(), 1000, config["optim"]["schedule"], task.restarts)
    lightning_trainer(**{**config["trainer"], "logger": False, "enable_checkpointing": False})


def averaging(ema: float) -> list[Callback]:
    if not 0 <= ema < 1:
        raise UserError(f"optim.ema {ema} must be in 0 < decay < 1, or 0 for none")
    return [EMAWeightAveraging(decay=ema)] if ema else []
