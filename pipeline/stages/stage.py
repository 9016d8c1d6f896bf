"""The words of chains: a stage takes a network and gives one; supplies are what stages draw on."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from pipeline.compression.calibrate.batches import cut, samples
from pipeline.compression.calibrate.repair import statistics
from pipeline.compression.compress import made_pictures
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import ChannelGroups
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.plan import Plan, history, numbers
from pipeline.compression.recipe import Calibration, text_of
from pipeline.compression.report import Report
from pipeline.compression.sizes.count import Counted
from pipeline.compression.trace.graph import channel_groups
from pipeline.example import Example
from pipeline.tables import UserError
from pipeline.tasks.task import Batch, Task

CALIBRATION = 512  # unlabelled samples that compensation looks at where a recipe does not say how many
# A stage can need calibration (unlabelled samples) and labels (those samples with their labels).
NEEDS = ("calibration", "labels")
# The forms that a network's weights have along a chain: numbers of any value; numbers on the grid of a quantizer; a
# finished ONNX file; one of OpenVINO; a finished program for torch.compile.
FORMS = ("float", "grid", "file", "openvino", "program")


@dataclass(frozen=True, eq=False)
class State:
    """A network on its way through a chain.

    report: of its last compression; None without one.
    before: the network whose BatchNorm statistics a repair goes by, because a stage has changed weights since; plan:
        how its channels became those of `model`; None: one by one. Where before is None, a repair goes by the network
        where the chain began.
    seconds: that its stages took.
    """

    model: nn.Module
    report: Report | None = None
    before: nn.Module | None = None
    seconds: float = 0.0
    plan: Plan | None = None

    def begun(self) -> "State":
        """The state in which a stage begins to change weights that a later repair goes by.

        That repair goes by this network, unless a stage before has not been repaired, which has a network of its own.
        """
        return self if self.before is not None else replace(self, before=bare_copy(self.model), plan=None)

    def copied(self) -> "State":
        """The same state with its own copy of the network."""
        return replace(self, model=bare_copy(self.model))


@dataclass(frozen=True)
class Terms:
    """What a stage asks of a network's weights, and what it leaves.

    takes: the FORMS that it can work on. leaves: the form behind it; "": that which it found.
    before: what becomes of `State.before`: "keeps" it, "sets" it (weights change, statistics of BatchNorm do not),
        "begins" it (as `State.begun`), or "clears" it (the statistics are right again, so that a repair would find
        nothing).
    """

    takes: frozenset[str] = frozenset({"float"})
    leaves: str = ""
    before: str = "keeps"


class Seen(NamedTuple):
    """Training samples that a stage looks at; one counts each time that it is trained on."""

    unlabelled: int = 0
    labelled: int = 0


@dataclass(frozen=True)
class Training:
    """The training data as training sees it: shuffled, augmented. epoch: number of an epoch -> its batches.

    samples, steps: samples and batches in an epoch.
    """

    epoch: Callable[[int], Iterable[Batch]]
    samples: int
    steps: int


class Stage(Protocol):
    """One step of a chain. A stage is a frozen record of its options; `str` of it is its spelling.

    A stage whose options may not fit what there is also has `check(supplies)`, which raises UserError. It is called
    before anything is written, where supplies may still lack training samples.
    """

    terms: Terms

    @property
    def needs(self) -> frozenset[str]:
        """Those of NEEDS that the stage draws on."""

    @property
    def facts(self) -> Mapping[str, str]:
        """The columns of a row (see `recipe.about`) that say something else behind this stage."""

    def reason_against(self, model: nn.Module) -> str:
        """Why this network has nothing for the stage, in a few words; "" where the stage can run."""

    def seen(self, supplies: "Supplies") -> Seen:
        """How many training samples the stage looks at."""

    def run(self, state: State, supplies: "Supplies") -> State:
        """The state after the stage, which may change the network in place: it is the stage's own copy."""


@dataclass
class Traces:
    """Channel groups and MACs of the architectures seen so far: each is traced and counted once."""

    groups: dict[tuple[Any, ...], ChannelGroups] = field(default_factory=dict)
    counted: Counted = field(default_factory=Counted)

    def of(self, model: nn.Module, example: Example, parts: Sequence[str]) -> ChannelGroups:
        """The groups of networks like this one. Shapes are not the whole key: fewer and narrower heads share them."""
        shapes = [tuple(t.shape) for t in named_tensors(model).values()]
        key = tuple(parts), *shapes, *sorted(numbers(history(model)).items())
        if key not in self.groups:
            self.groups[key] = channel_groups(model, example, parts)
        return self.groups[key]


@dataclass
class Supplies:
    """Everything that the chains of one network draw on, on the network's device.

    dense: the network where its chains begin. example: the network's arguments, a batch of one.
    batches: training samples with their labels, without augmentation.
    forward: context of every forward pass (autocast).
    training: the training data as training sees it; None: stages that train do so on `batches`.
    teachers: {name: makes a network to learn from, on the device}.
    folder: where a stage keeps its progress and its files; None: nowhere, a stage that is cut off starts anew.
    certify: whether networks will be kept, and so need certificates (see compression.certify).
    """

    dense: nn.Module
    example: Example
    task: Task
    batches: Sequence[Batch] = ()
    seed: int = 0
    traces: Traces = field(default_factory=Traces)
    forward: Callable[[], AbstractContextManager] = nullcontext
    training: Training | None = None
    teachers: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    folder: Path | None = None
    certify: bool = True

    @cached_property
    def samples(self) -> int:
        """How many samples the batches hold."""
        return sum(map(samples, self.inputs))

    @cached_property
    def inputs(self) -> list[Example]:
        """The network's arguments for each of the batches."""
        return [self.task.inputs(batch) for batch in self.batches]

    @cached_property
    def made(self) -> dict[Calibration, Tensor]:
        """{calibration: inputs that the network itself gave for it}"""
        return {}

    def pictures(self, calibration: Calibration) -> Any:
        """The samples for a calibration: None, the first samples of the batches, or inputs that the network gives."""
        size = calibration.size
        if calibration.pictures == "none":
            return None
        if calibration.pictures == "data":
            if size is not None and self.samples < size:
                raise UserError(
                    f"size={size} asks for more samples than the {self.samples} there are; raise repair_size="
                )
            return first_samples(self.inputs, size or CALIBRATION)
        kind = Calibration(calibration.pictures, size, temperature=calibration.temperature)
        if kind not in self.made:
            self.made[kind] = made_pictures(self.dense, self.example, kind, self.seed, self.task.answers)
        return self.made[kind]

    @cached_property
    def _statistics(self) -> dict[str, Tensor]:
        return statistics(self.dense, self.inputs)

    def statistics(self, model: nn.Module) -> dict[str, Tensor]:
        """BatchNorm statistics of a network on the batches; those of the dense one are computed once and kept."""
        return self._statistics if model is self.dense else statistics(model, self.inputs)


def first_samples(batches: Sequence[Example], count: int) -> list[Example]:
    """The first `count` samples of batches of network inputs, in batches."""
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


def spelled(name: str, stage: Any) -> str:
    """The spelling of a stage, such as tune(epochs=3,lr=0.01); options at their defaults are left out."""
    given = {f.name: getattr(stage, f.name) for f in fields(stage) if getattr(stage, f.name) != f.default}
    options = [f"{key}={number_text(v) if is_number(v) else text_of(v)}" for key, v in given.items()]
    return f"{name}({','.join(options)})" if options else name


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def timed(found: dict[str, float]) -> Iterator[None]:
    """Adds the seconds that the block takes to found["seconds"]."""
    start = time.perf_counter()
    try:
        yield
    finally:
        found["seconds"] = found.get("seconds", 0.0) + time.perf_counter() - start
