"""The resolved config as plain values, and what of it is refused before anything is built."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from pipeline.cells import flat
from pipeline.loggers import WANDB_MODES, check_login
from pipeline.sharpness import asked_for
from pipeline.tables import UserError, pick
from scripts.stop import check_processes

Config = dict[str, Any]


def resolved(config: DictConfig) -> Config:
    """Plain dicts and lists, every value set."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is not set; give it on the command line: {missing[0]}=...")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return plain


def check(config: Config) -> None:
    """UserError for values that the parts would refuse too late, or not in one line."""
    values = flat(config)
    for key, least in {"seed": 0, "trainer.max_epochs": 1, "trainer.accumulate_grad_batches": 1}.items():
        value = values.get(key, least)
        if not isinstance(value, int) or value < least:
            raise UserError(f"{key} {value} must be a whole number of at least {least}")
    if not re.fullmatch(r"[\w.-]+", str(config["name"])):
        raise UserError(f"name {config['name']!r} becomes a folder's name; use letters, digits, '.', '_' and '-'")
    if "trainer" in config:
        trainer = config["trainer"]
        check_processes(trainer["accelerator"], trainer["devices"], torch.accelerator.device_count())
    mode = values.get("wandb.mode", "auto")
    pick("wandb.mode", dict.fromkeys(WANDB_MODES), mode)
    check_login(mode)
    if values.get("wandb.artifacts") and not values["compression.save"] and values["shrink.method"] is None:
        raise UserError(
            "wandb.artifacts=true uploads the smaller networks that a run keeps, and this one keeps none; add "
            "compression.save=true"
        )
    asked_for((config.get("compression") or {}).get("sharpness"))  # {} has no name in the hash of the cell


def under(key: str, names: Iterable[str]) -> bool:
    """Is the dotted `key` one of `names` or inside of one?"""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}
