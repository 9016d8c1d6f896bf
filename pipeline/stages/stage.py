"""The words of chains: a stage takes a network and gives one; supplies are what stages draw on."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn

from pipeline.compression.calibrate.batches import cut, samples
from pipeline.compression.calibrate.repair import statistics
from pipeline.compression.calibrate.synthetic import synthesize
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import ChannelGroups
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.plan import history, numbers
from pipeline.compression.report import Report
from pipeline.compression.sizes.count import Counted
from pipeline.compression.trace.graph import Example, channel_groups
from pipeline.tasks.task import Batch, Task

CALIBRATION = 512  # unlabelled samples that compensation looks at where a recipe does not say how many
# What a stage can need: calibration, unlabelled samples; labels, those samples with their labels.
NEEDS = ("calibration", "labels")


@dataclass(frozen=True, eq=False)
class State:
    """A network on its way through a chain.

    report: of its last compression, and before: the network that this compression took; None for one that is as it was.
    seconds: what its stages took.
    """

    model: nn.Module
    report: Report | None = None
    before: nn.Module | None = None
    seconds: float = 0.0

    def copied(self) -> "State":
        """The same with a network of its own."""
        return replace(self, model=bare_copy(self.model))


class Stage(Protocol):
    """One step of a chain. A stage is a frozen record of its options; `str` of it is its spelling."""

    @property
    def needs(self) -> frozenset[str]:
        """Those of NEEDS that it draws on."""

    def reason_against(self, model: nn.Module) -> str:
        """Why this network has nothing for the stage, in a few words; "" where it has."""

    def run(self, state: State, supplies: "Supplies") -> State:
        """What becomes of the network, which is a copy of the stage's own."""


@dataclass
class Traces:
    """Channel groups and MACs of the architectures seen so far: each is traced and counted once."""

    groups: dict[tuple[Any, ...], ChannelGroups] = field(default_factory=dict)
    counted: Counted = field(default_factory=Counted)

    def of(self, model: nn.Module, example: Example, parts: Sequence[str]) -> ChannelGroups:
        """The groups of networks like this one. Fewer heads and narrower ones have the same shapes."""
        shapes = [tuple(t.shape) for t in named_tensors(model).values()]
        key = tuple(parts), *shapes, *sorted(numbers(history(model)).items())
        if key not in self.groups:
            self.groups[key] = channel_groups(model, example, parts)
        return self.groups[key]


@dataclass
class Supplies:
    """What the chains of one network draw on. All of it lies on the network's device.

    dense: the network where its chains begin. example: what it is called with, a batch of one.
    batches: training samples with their labels, without augmentation.
    forward: context of every forward pass (autocast).
    """

    dense: nn.Module
    example: Example
    task: Task
    batches: Sequence[Batch] = ()
    seed: int = 0
    traces: Traces = field(default_factory=Traces)
    forward: Callable[[], AbstractContextManager] = nullcontext

    @cached_property
    def inputs(self) -> list[Example]:
        """What the network is called with on the batches."""
        return [self.task.inputs(batch) for batch in self.batches]

    @cached_property
    def synthetic(self) -> dict[int | None, Tensor]:
        """Pictures of the network's own, by how many were asked for."""
        return {}

    def pictures(self, kind: str, size: int | None) -> Any:
        """What a recipe's calibration looks at: None, synthetic pictures, or the first samples of the batches."""
        if kind == "none":
            return None
        if kind == "data":
            return first_samples(self.inputs, size or CALIBRATION)
        if size not in self.synthetic:
            count = {} if size is None else {"count": size}
            self.synthetic[size] = synthesize(self.dense, self.example, seed=self.seed, **count)
        return self.synthetic[size]

    @cached_property
    def _statistics(self) -> dict[str, Tensor]:
        return statistics(self.dense, self.inputs)

    def statistics(self, model: nn.Module) -> dict[str, Tensor]:
        """BatchNorm statistics of a network on the batches, of the dense one found once; others are not kept alive."""
        return self._statistics if model is self.dense else statistics(model, self.inputs)


def first_samples(batches: Sequence[Example], count: int) -> list[Example]:
    """The first samples of batches of network inputs, in batches."""
    found: list[Example] = []
    for batch in batches:
        if count > 0:
            found.append(batch if samples(batch) <= count else cut(batch, 0, count))
        count -= samples(batch)
    return found


def number_text(value: float) -> str:
    """The shortest text that is this number again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


@contextmanager
def timed(found: dict[str, float]) -> Iterator[None]:
    """Adds what the block takes to found["seconds"]."""
    start = time.perf_counter()
    try:
        yield
    finally:
        found["seconds"] = found.get("seconds", 0.0) + time.perf_counter() - start
