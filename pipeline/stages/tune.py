"""Weights trained after a compression, those of the norms alone or all of them: on labelled samples, or on own texts.

A language model that was compressed can learn from texts that it wrote before (on=self): each next token is a draw from
the dense network's prediction, so the expected gradient is that of distilling it, and no data is needed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.backward import sound_backward
from pipeline.compression.calibrate.repair import kept_modes, norm_parameters
from pipeline.compression.plan import history
from pipeline.compression.recipe import Calibration
from pipeline.evaluate import outputs
from pipeline.stages.stage import Seen, State, Supplies, Terms, is_number, spelled
from pipeline.tables import UserError, pick
from pipeline.tasks.task import Batch, Task

# The samples that are trained on, and what they need: the training data with its labels, or texts that the dense
# network itself writes, which hold their own targets.
SOURCES = {"data": frozenset({"labels"}), "self": frozenset[str]()}
TEXTS = 8  # own texts in a batch
# In place of a zero that a mask leaves: too small to change a sum, and its products are no denormal numbers, which are
# slow to compute with. The half format has no number so small; its least normal one stands in.
LEFT = 1e-20


@dataclass(frozen=True)
class TuneNorms:
    """Train the gains and shifts of all norms, and nothing else; Adam with lr, one step a batch.

    on, size: see `samples_on`.

    The study calls this REPAIR for ViT and CLIP (one supervised epoch on LayerNorm parameters). Its results are a stage
    of their own because it sees labels.
    """

    lr: float = 1e-3
    on: str = "data"
    size: int | None = None

    facts = MappingProxyType({})
    terms = Terms(frozenset({"float", "grid"}))  # a grid holds no norms

    def __post_init__(self) -> None:
        check_on("tune_norms", self.on, self.size)
        check_positive("tune_norms", lr=self.lr)

    @property
    def needs(self) -> frozenset[str]:
        return SOURCES[self.on]

    def __str__(self) -> str:
        return spelled("tune_norms", self)

    def reason_against(self, model: nn.Module) -> str:
        return "" if norm_parameters(model) else "no norm has a gain or a shift"

    def check(self, supplies: Supplies) -> None:
        check_source(self.on, supplies.task)

    def seen(self, supplies: Supplies) -> Seen:
        return Seen(labelled=supplies.samples if self.needs else 0)

    def run(self, state: State, supplies: Supplies) -> State:
        tune_norms_(state.model, samples_on(self.on, supplies, self.size), supplies.task, self.lr)
        return state


@dataclass(frozen=True)
class Tune:
    """Train all weights; Adam with lr, `epochs` passes over the samples as they are.

    on, size: see `samples_on`.

    Weights that a mask removed stay zero.
    """

    epochs: int = 1
    lr: float = 1e-4
    on: str = "data"
    size: int | None = None

    facts = MappingProxyType({"statistics": "data"})  # BatchNorm is in training mode
    terms = Terms()

    def __post_init__(self) -> None:
        check_on("tune", self.on, self.size)
        check_positive("tune", epochs=self.epochs, lr=self.lr)
        check_whole("tune", epochs=self.epochs)

    @property
    def needs(self) -> frozenset[str]:
        return SOURCES[self.on]

    def __str__(self) -> str:
        return spelled("tune", self)

    def reason_against(self, model: nn.Module) -> str:
        return ""

    def check(self, supplies: Supplies) -> None:
        check_source(self.on, supplies.task)

    def seen(self, supplies: Supplies) -> Seen:
        return Seen(labelled=self.epochs * supplies.samples if self.needs else 0)

    def run(self, state: State, supplies: Supplies) -> State:
        with kept_modes(state.model):
            state.model.train()
            samples = samples_on(self.on, supplies, self.size)
            train_(state.model, set(state.model.parameters()), samples, supplies.task, self.lr, self.epochs)
        return state


def samples_on(source: str, supplies: Supplies, size: int | None = None) -> Sequence[Batch]:
    """Batches to train on, from a row of SOURCES. size: of own texts, how many; None: as many as calibrate."""
    check_source(source, supplies.task)
    if source == "data":
        return supplies.batches
    return supplies.pictures(Calibration(source, size)).split(TEXTS)


def check_on(name: str, source: str, size: int | None) -> None:
    """UserError for an unknown source, and for a number of texts that is none or that nobody writes."""
    pick("on", SOURCES, source)
    if size is not None:
        if source != "self":
            raise UserError(f"{name}: size {size} is of texts that the network writes: give on=self, too")
        check_positive(name, size=size)
        check_whole(name, size=size)


def check_source(source: str, task: Task) -> None:
    """UserError for own texts where the task is not language modelling."""
    if source == "self" and task.name != "language":
        raise UserError(f"on={source} trains on texts, and the task is {task.name}: choose on=data")


def tune_norms_(model: nn.Module, batches: Iterable[Batch], task: Task, lr: float = 1e-3) -> bool:
    """In place: train the gains and shifts of all norms. Statistics of BatchNorm stay as they are.

    Returns False, and does nothing, for a model without such parameters.
    """
    tuned = norm_parameters(model)
    if tuned:
        with kept_modes(model):
            model.eval()  # dropout off, BatchNorm statistics fixed
            train_(model, tuned, batches, task, lr)
    return bool(tuned)


def train_(
    model: nn.Module, tuned: set[nn.Parameter], batches: Iterable[Batch], task: Task, lr: float, epochs: int = 1
) -> None:
    """In place: Adam on these parameters alone, one step a batch. Flags and gradients are left as they were found."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p in tuned], lr)
    with trainable(model, tuned):
        for _ in range(epochs):
            train_epoch_(model, optimizer, batches, task)


def train_epoch_(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    task: Task,
    stepped: Callable[[], None] = lambda: None,
) -> None:
    """In place: one optimizer step a batch, after which weights that a mask removed are zero again.

    stepped: called after every step.
    """
    held = masks(model)
    for batch in batches:
        loss = task.loss(outputs(model, task, batch), batch)
        optimizer.zero_grad()
        with sound_backward(model):
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            for weight, kept in held:
                weight.mul_(kept)
        stepped()


def masks(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(weight, bool of its shape: the entries that are left) of all weights that a mask went over."""
    masked = {name for step in history(model) for name in step.about.get("layers", {})}
    return [(p, p.detach() != 0) for name, p in model.named_parameters() if name in masked]


@torch.no_grad()
def show_(weight: Tensor, kept: Tensor) -> None:
    """In place: zeros that a mask leaves become LEFT, because `masks` takes every zero for an entry that is removed.

    Otherwise a layer that begins at zero would never learn. kept: bool of the weight's shape
    """
    weight.masked_fill_(kept & (weight == 0), max(LEFT, torch.finfo(weight.dtype).tiny))


@contextmanager
def trainable(model: nn.Module, tuned: set[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients are on, for these parameters alone. Afterwards flags are as before, and gradients are gone."""
    needed_grad = {p: p.requires_grad for p in model.parameters()}
    with torch.enable_grad():
        try:
            for p in needed_grad:
                p.requires_grad_(p in tuned)
            yield
        finally:
            for p, flag in needed_grad.items():
                p.requires_grad_(flag)
            for p in tuned:
                p.grad = None


def check_positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not is_number(value) or not 0 < value < math.inf:
            raise UserError(f"{name}: {key} {value} must be greater than 0, and finite")


def check_whole(name: str, **values: float) -> None:
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{name}: {key} {value} must be a whole number")
