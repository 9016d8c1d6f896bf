"""OPTIMIZERS and SCHEDULES by name. Options are those of the class or function in the row; unknown ones are refused."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from pipeline.tables import call, pick

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def constant(optimizer: Optimizer, steps: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1.0)


def cosine(optimizer: Optimizer, steps: int, end: float = 0.0) -> LRScheduler:
    """From the optimizer's learning rate down to `end` over all steps (arXiv:1608.03983, without restarts)."""
    return CosineAnnealingLR(optimizer, steps, end)


def one_cycle(optimizer: Optimizer, steps: int, warmup: float = 0.3) -> LRScheduler:
    """Up to the optimizer's learning rate over the first `warmup` fraction of the steps, then down to almost zero."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    # The momentum stays what the recipe says.
    return OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=warmup, cycle_momentum=False)


# A schedule is stepped after every optimizer step; steps: their total number.
SCHEDULES: dict[str, Callable[..., LRScheduler]] = {"constant": constant, "cosine": cosine, "one_cycle": one_cycle}


def build_optimizer(parameters: Iterable[nn.Parameter], name: str, lr: float, **options: Any) -> Optimizer:
    """The optimizer called `name` at learning rate `lr`."""
    return call(f"optimizer {name!r}", pick("optimizer", OPTIMIZERS, name), parameters, lr=lr, **options)


def build_schedule(optimizer: Optimizer, steps: int, schedule: Mapping[str, Any]) -> LRScheduler:
    """The schedule {"name": ..., its options} over `steps` optimizer steps."""
    name = schedule["name"]
    options = {key: value for key, value in schedule.items() if key != "name"}
    return call(f"schedule {name!r}", pick("schedule", SCHEDULES, name), optimizer, steps, **options)
