"""From a resolved config to the objects that it names. Config objects stop here: parts get plain arguments."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from callbacks import CompressionCallback
from callbacks.progress import CompressionProgressBar
from pipeline.data.module import PictureData
from pipeline.loggers import wandb_logger
from pipeline.models import build_model
from pipeline.tables import UserError, call
from pipeline.tasks import Classification

Config = dict[str, Any]


def resolved(config: DictConfig) -> Config:
    """Plain dicts and lists, every value set."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is not set; give it on the command line: {missing[0]}=...")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return plain


def cell_of(config: Config) -> str:
    """Name of the run: a hash of what is run, not of where its files and logs go."""
    what = {key: value for key, value in config.items() if key not in ("paths", "wandb")}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return f"{config['name']}-{digest[:10]}"


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def build_data(config: Config) -> PictureData:
    data = call("data", PictureData, seed=config["seed"], **config["data"])
    data.prepare_data()
    data.setup()
    return data


def build_task(config: Config, data: PictureData) -> Classification:
    net = build_model(classes=data.num_classes, channels=data.channels, **config["model"])
    net = net.to(memory_format=torch.channels_last)  # convolutions train 1.7 times as fast on a CPU
    optim = without(config["optim"], "schedule")
    return Classification(net, data.num_classes, optim, config["optim"]["schedule"], config["label_smoothing"])


def build_compression(config: Config, cell: str, folder: Path) -> CompressionCallback:
    context = {
        "cell": cell,
        "model": config["model"].get("architecture", config["model"]["name"]),
        "data": config["data"]["name"],
        "seed": config["seed"],
    }
    options = without(config["compression"], "save")
    return call(
        "compression",
        CompressionCallback,
        **options,
        rows=folder / "rows.parquet",
        save_to=folder / "compressed" if config["compression"]["save"] else None,
        context=context,
        seed=config["seed"],
    )


def build_trainer(config: Config, cell: str, folder: Path, compression: CompressionCallback) -> Trainer:
    callbacks: list[Callback] = [compression, ModelCheckpoint(folder, save_last=True, save_top_k=0)]
    if config["trainer"].get("enable_progress_bar", True):
        middle = min(compression.ratios, key=lambda ratio: abs(ratio - 0.5))
        callbacks.append(CompressionProgressBar(list(compression.methods), middle))
    loggers = [
        CSVLogger(folder, name="metrics", version=""),
        wandb_logger(folder, config["wandb"]["project"], cell, config, config["wandb"]["mode"]),
    ]
    return call(
        "trainer",
        Trainer,
        **config["trainer"],
        default_root_dir=folder,
        logger=[logger for logger in loggers if logger is not None],
        callbacks=callbacks,
        enable_model_summary=False,
        log_every_n_steps=50,
    )
