"""Distillation as a stage: the network learns to answer as a teacher does, by default without a label."""

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from pipeline.compression.calibrate.batches import samples
from pipeline.compression.calibrate.repair import kept_modes
from pipeline.evaluate import evaluating, outputs
from pipeline.optim import build_optimizer, build_schedule
from pipeline.stages.stage import Seen, State, Supplies, Terms, Training, spelled
from pipeline.stages.tune import SOURCES, check_positive, check_whole, samples_on, train_epoch_, trainable
from pipeline.tables import UserError, pick
from pipeline.tasks.distilled import DKD, LOSSES, Distilled
from pipeline.tasks.task import Batch

DENSE = "dense"  # the teacher: the network where the chain began
PROGRESS = "progress.pt"


@dataclass(frozen=True)
class Distil:
    """Train all weights on the answers of a teacher; Adam with a cosine from lr to 0 over `epochs` passes.

    labels: the share of the loss on hard labels, 0 <= labels < 1. loss, temperature, beta: see tasks.Distilled.
    teacher: "dense", the network where the chain began; or the name of one of the `teachers`, or a file.
    on: a row of SOURCES: "data" is the training data, shuffled and augmented where the host has it so, else the samples
        that repair sees.

    Weights that a mask removed stay zero. An epoch's randomness follows from seed and epoch alone, so a stage that is
    cut off goes on from its last epoch and ends bit for bit as it would have.
    """

    epochs: int = 1
    lr: float = 3e-3
    labels: float = 0.0
    temperature: float = 4.0
    teacher: str = DENSE
    loss: str = "kl"
    beta: float = 8.0
    on: str = "data"

    facts = MappingProxyType({"statistics": "data"})  # BatchNorm is in training mode
    terms = Terms()

    def __post_init__(self) -> None:
        pick("on", SOURCES, self.on)
        pick("loss", dict.fromkeys(LOSSES), self.loss)
        check_positive("distil", epochs=self.epochs, lr=self.lr, temperature=self.temperature, beta=self.beta)
        check_whole("distil", epochs=self.epochs)
        if isinstance(self.labels, str) or not 0 <= self.labels < 1:
            raise UserError(f"distil: labels {self.labels} must be in 0 <= labels < 1; tune trains on labels alone")
        if self.loss != DKD and self.beta != Distil.beta:
            raise UserError(f"distil: beta {self.beta} is of loss=dkd, and the loss is {self.loss}; leave it out")

    @property
    def sees_labels(self) -> bool:
        return bool(self.labels) or self.loss == DKD

    @property
    def needs(self) -> frozenset[str]:
        if self.on != "data":
            return SOURCES[self.on]
        return frozenset({"labels"} if self.sees_labels else {"calibration"})

    def __str__(self) -> str:
        return spelled("distil", self)

    def reason_against(self, model: nn.Module) -> str:
        return ""

    def seen(self, supplies: Supplies) -> Seen:
        if self.on != "data":
            return Seen()
        count = self.epochs * (supplies.training.samples if supplies.training else supplies.samples)
        return Seen(labelled=count) if self.sees_labels else Seen(count)

    def run(self, state: State, supplies: Supplies) -> State:
        teacher, inner = self.teacher_of(supplies), supplies.task
        task = Distilled(
            inner,
            lambda batch: outputs(teacher, inner, batch),
            self.loss,
            self.temperature,
            self.labels,
            self.beta,
        )
        with evaluating(teacher), kept_modes(state.model):
            state.model.train()
            self.learn_(state.model, task, supplies)
        return state

    def teacher_of(self, supplies: Supplies) -> nn.Module:
        if self.teacher == DENSE:
            return supplies.dense
        return pick("teacher", supplies.teachers, self.teacher)()

    def learn_(self, model: nn.Module, task: Distilled, supplies: Supplies) -> None:
        given = training_on(self.on, supplies)
        optimizer = build_optimizer(list(model.parameters()), "adam", self.lr)
        schedule = build_schedule(optimizer, self.epochs * given.steps, {"name": "cosine"})
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        place = None if supplies.folder is None else supplies.folder / PROGRESS
        with trainable(model, set(model.parameters())):
            for epoch in range(resumed_(parts, place), self.epochs):
                with seeded(supplies.seed, epoch):
                    train_epoch_(model, optimizer, given.epoch(epoch), task, schedule.step)
                keep(parts, place, epoch + 1)


def training_on(source: str, supplies: Supplies) -> Training:
    """The samples to train on: the training data where the host has them, else a row of SOURCES."""
    if source == "data" and supplies.training is not None:
        return supplies.training
    batches: Sequence[Batch] = samples_on(source, supplies)

    def shuffled(epoch: int) -> Iterable[Batch]:
        return [batches[i] for i in torch.randperm(len(batches)).tolist()]

    return Training(shuffled, sum(map(samples, batches)), len(batches))


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Inside, all randomness follows from these numbers; afterwards it goes on as if nothing had been drawn."""
    with isolate_rng():
        (seed,) = np.random.SeedSequence(words).generate_state(1)
        random.seed(int(seed))
        np.random.seed(seed)
        torch.manual_seed(int(seed))
        yield


def keep(parts: dict[str, Any], place: Path | None, epoch: int) -> None:
    """Write how far the parts are. The file is replaced whole, so that a kill never leaves half of it."""
    if place is None:
        return
    part = place.with_suffix(".part")
    torch.save({"epoch": epoch, **{name: one.state_dict() for name, one in parts.items()}}, part)
    os.replace(part, place)


def resumed_(parts: dict[str, Any], place: Path | None) -> int:
    """In place: every part as it was kept; returns the number of epochs that are done."""
    if place is None or not place.exists():
        return 0
    kept = torch.load(place, map_location="cpu", weights_only=True)
    for name, one in parts.items():
        one.load_state_dict(kept[name])
    return kept["epoch"]
