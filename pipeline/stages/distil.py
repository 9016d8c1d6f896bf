"""Distillation as a stage: the network learns to answer as a teacher does, by default without a label."""

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from pipeline.compression.calibrate.batches import samples
from pipeline.compression.calibrate.repair import kept_modes
from pipeline.compression.group import DEFAULT_PARTS, ChannelGroups
from pipeline.evaluate import evaluating, outputs
from pipeline.example import Example
from pipeline.optim import build_optimizer, build_schedule
from pipeline.stages.features import Hints, hinted, hints_of
from pipeline.stages.stage import Seen, State, Supplies, Terms, Traces, Training, spelled
from pipeline.stages.tune import (
    SOURCES,
    check_on,
    check_positive,
    check_source,
    check_whole,
    samples_on,
    train_epoch_,
    trainable,
)
from pipeline.tables import UserError, pick
from pipeline.tasks.distilled import DKD, LOSSES, Distilled
from pipeline.tasks.task import Batch, Task

DENSE = "dense"  # the teacher: the network where the chain began
PROGRESS = "progress.pt"


class Usual(NamedTuple):
    """How a network is taught where a lesson does not say. lr: of Adam; temperature: see tasks.Distilled."""

    lr: float = 3e-3
    temperature: float = 4.0


# By the name of the task. Texts were compared on documents that are not reported (docs/log.md, 2026-11-29).
BY_TASK = {"language": Usual(lr=5e-4, temperature=1.0)}


def usual(task: Task) -> Usual:
    return BY_TASK.get(task.name, Usual())


def said(**options: float | None) -> dict[str, float]:
    """The options that are given."""
    return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class Lesson:
    """What a network learns from a teacher: its answers, and the features of some layers.

    labels: the share of the loss on hard labels, 0 <= labels < 1. loss, temperature, beta: see tasks.Distilled.
    temperature: None: that of BY_TASK.
    features: weight of the error of hidden layers; 0: answers alone. layers: whose outputs are matched; none: where the
        channels are read that a compression changed; see stages.features.
    """

    labels: float = 0.0
    temperature: float | None = None
    loss: str = "kl"
    beta: float = 8.0
    features: float = 0.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pick("loss", dict.fromkeys(LOSSES), self.loss)
        check_positive("distil", beta=self.beta, **said(temperature=self.temperature))
        if isinstance(self.labels, str) or not 0 <= self.labels < 1:
            raise UserError(f"distil: labels {self.labels} must be in 0 <= labels < 1; tune trains on labels alone")
        if self.loss != DKD and self.beta != Lesson.beta:
            raise UserError(f"distil: beta {self.beta} is of loss=dkd, and the loss is {self.loss}; leave it out")
        if isinstance(self.features, str) or not 0 <= self.features < math.inf:
            raise UserError(f"distil: features {self.features} must be a weight of at least 0, and finite")
        if isinstance(self.layers, str):
            raise UserError(f"distil: layers must be a list, such as [{self.layers}], got {self.layers!r}")
        if wrong := [layer for layer in self.layers if not isinstance(layer, str)]:
            raise UserError(f"distil: layers are names, got {wrong[0]!r}; put it in quotes")
        if self.layers and not self.features:
            raise UserError("distil: layers are matched with a weight; give one, such as features=1")

    @property
    def sees_labels(self) -> bool:
        return bool(self.labels) or self.loss == DKD

    def hints(
        self, student: nn.Module, teacher: nn.Module, example: Example, groups: Callable[[], ChannelGroups]
    ) -> Hints | None:
        """The features to match; None without. groups: gives those of the teacher. UserError as for `hints_of`."""
        return hints_of(student, teacher, example, self.layers, groups) if self.features else None

    def task(self, inner: Task, teacher: Callable[[Batch], Any], hints: Hints | None) -> Distilled:
        """The task to train on. teacher: batch -> its output, in eval mode"""
        told = None if hints is None else hints.loss
        temperature = usual(inner).temperature if self.temperature is None else self.temperature
        parts = (self.loss, temperature, self.labels, self.beta)
        return Distilled(inner, teacher, *parts, features=self.features, hints=told)


@dataclass(frozen=True)
class Distil:
    """Train all weights on the answers of a teacher; Adam with a cosine from lr to 0 over `epochs` passes.

    lr: None: that of BY_TASK. labels, temperature, loss, beta, features, layers: see Lesson.
    teacher: "dense", the network where the chain began; or the name of one of the `teachers`, or a file.
    on: a row of SOURCES: "data" is the training data, shuffled and augmented where the host has it so, else the samples
        that repair sees. size: of own texts, how many; None: as many as calibrate.

    Weights that a mask removed stay zero. An epoch's randomness follows from seed and epoch alone, so a stage that is
    cut off goes on from its last epoch and ends bit for bit as it would have.
    """

    epochs: int = 1
    lr: float | None = None
    labels: float = 0.0
    temperature: float | None = None
    teacher: str = DENSE
    loss: str = "kl"
    beta: float = 8.0
    on: str = "data"
    features: float = 0.0
    layers: tuple[str, ...] = ()
    size: int | None = None

    facts = MappingProxyType({"statistics": "data"})  # BatchNorm is in training mode
    terms = Terms()

    def __post_init__(self) -> None:
        check_on("distil", self.on, self.size)
        _ = self.lesson
        check_positive("distil", epochs=self.epochs, **said(lr=self.lr))
        check_whole("distil", epochs=self.epochs)

    @property
    def lesson(self) -> Lesson:
        return Lesson(self.labels, self.temperature, self.loss, self.beta, self.features, self.layers)

    @property
    def needs(self) -> frozenset[str]:
        if self.on != "data":
            return SOURCES[self.on]
        return frozenset({"labels"} if self.lesson.sees_labels else {"calibration"})

    def __str__(self) -> str:
        return spelled("distil", self)

    def reason_against(self, model: nn.Module) -> str:
        return ""

    def seen(self, supplies: Supplies) -> Seen:
        if self.on != "data":
            return Seen()
        count = self.epochs * (supplies.training.samples if supplies.training else supplies.samples)
        return Seen(labelled=count) if self.lesson.sees_labels else Seen(count)

    def run(self, state: State, supplies: Supplies) -> State:
        teacher, inner = self.teacher_of(supplies), supplies.task
        hints = self.hints(state.model, teacher, supplies.example, supplies.traces, supplies.seed)
        with evaluating(teacher), kept_modes(state.model), hinted(hints):
            task = self.lesson.task(inner, lambda batch: outputs(teacher, inner, batch), hints)
            state.model.train()
            self.learn_(state.model, task, supplies, nn.ModuleDict() if hints is None else hints.regressors)
        return state

    def hints(
        self, student: nn.Module, teacher: nn.Module, example: Example, traces: Traces, seed: int = 0
    ) -> Hints | None:
        """The features to match; regressors that are drawn at random follow from the seed."""
        with seeded(seed):
            return self.lesson.hints(student, teacher, example, lambda: traces.of(teacher, example, DEFAULT_PARTS))

    def check(self, supplies: Supplies) -> None:
        """UserError for a source or a teacher that is not there, and for features of no layer of the first network."""
        check_source(self.on, supplies.task)
        teacher = self.teacher_of(supplies)
        if self.features:
            with hinted(self.hints(supplies.dense, teacher, supplies.example, supplies.traces)):
                pass

    def teacher_of(self, supplies: Supplies) -> nn.Module:
        if self.teacher == DENSE:
            return supplies.dense
        if not supplies.teachers:
            raise UserError(
                f"teacher {self.teacher!r} is not there: a stage behind a method learns from {DENSE}, the network that "
                "was compressed; leave the teacher out, or give the stages as chain=, which takes others"
            )
        return pick("teacher", supplies.teachers, self.teacher)()

    def learn_(self, model: nn.Module, task: Task, supplies: Supplies, regressors: nn.ModuleDict) -> None:
        given = training_on(self.on, supplies, self.size)
        lr = usual(task).lr if self.lr is None else self.lr
        optimizer = build_optimizer([*model.parameters(), *regressors.parameters()], "adam", lr)
        schedule = build_schedule(optimizer, self.epochs * given.steps, {"name": "cosine"})
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "regressors": regressors}
        place = None if supplies.folder is None else supplies.folder / PROGRESS
        with trainable(model, set(model.parameters())):
            for epoch in range(resumed_(parts, place), self.epochs):
                with seeded(supplies.seed, epoch):
                    train_epoch_(model, optimizer, given.epoch(epoch), task, schedule.step)
                keep(parts, place, epoch + 1)


def training_on(source: str, supplies: Supplies, size: int | None = None) -> Training:
    """The samples to train on: the training data where the host has them, else those of `samples_on`."""
    if source == "data" and supplies.training is not None:
        return supplies.training
    batches: Sequence[Batch] = samples_on(source, supplies, size)

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
