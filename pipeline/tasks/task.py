"""The protocol of a task, and how a batch and an output are taken apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pipeline.example import Example
from pipeline.tables import UserError

Key = int | str
IGNORED = -100  # class of a row that is not counted
Batch = Any  # as the loader gave it


class Task(Protocol):
    """How a batch is taken apart, trained on and measured.

    name: in tables of tasks
    metrics: names in METRICS; the first is the headline
    size: S, how many sums `totals` has

    A batch is as the loader gave it, an output as the network gave it. A task is settled once a batch has shown what it
    measures; before that it answers `inputs` and `settled` alone.
    """

    name: str

    @property
    def metrics(self) -> tuple[str, ...]: ...

    @property
    def size(self) -> int: ...

    @property
    def chance(self) -> float | None:
        """The headline of answers that are drawn blindly; None where no such number is known."""
        return None

    def inputs(self, batch: Any) -> Example:
        """The arguments that the network is called with."""

    def settled(self, output: Any, batch: Any) -> "Task":
        """The task with all that was open decided on this batch. UserError for a batch that it cannot measure."""

    def check(self, output: Any, batch: Any) -> None:
        """UserError for a batch that this task cannot measure. It may wait for the device, so call it once a batch."""

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        """() mean loss, to train by."""

    def totals(self, output: Any, batch: Any) -> Tensor:
        """(S,) float64 on the output's device, the first is n: sums that add up over batches and processes.

        Waits for the device only where it must, because it is called for every batch, also in training.
        """

    def values(self, totals: Tensor) -> dict[str, float]:
        """Every metric by its name; NaN where nothing was counted."""

    def count(self, totals: Tensor) -> int:
        """n, how many samples: pictures (in dense prediction, too) or sequences of text."""

    def answers(self, output: Any) -> Tensor:
        """(rows, classes) logits, one row for each picture, pixel or token, so that two networks can be compared."""

    def real(self, batch: Any) -> Tensor | None:
        """(rows,) bool: the rows of `answers` that are no padding; None: all. Labels are not looked at."""
        return None

    def targets(self, output: Any, batch: Any) -> Tensor:
        """(rows,) int64: the class of each row of `answers`, IGNORED where it is not counted."""
        raise UserError(f"the task {self.name} has no classes to learn from; say labels=0 and another loss")


@dataclass(frozen=True)
class Layout:
    """Says where inputs and labels are in a batch, and where scores are in an output.

    inputs, labels: index or key in a batch; None: the two of a pair, or all other keys of a dict and its key "labels".
        Several inputs, ("image", "mask"), are arguments in that order, or keyword arguments if the batch is a dict
    output: index, key or attribute of the scores; None: the output itself, or what it calls "logits" or "out"
    """

    inputs: Key | tuple[Key, ...] | None = None
    labels: Key | None = None
    output: Key | None = None

    def example(self, batch: Any) -> Example:
        """The arguments that the network is called with."""
        which = self._inputs(batch)
        if isinstance(which, tuple):
            found = {key: _part(batch, key) for key in which}
            return found if isinstance(batch, Mapping) else tuple(found.values())
        return _arguments(_part(batch, which))

    def target(self, batch: Any) -> Tensor:
        """The labels, as the batch holds them."""
        self._check(batch)
        labels = _part(batch, self._labels(batch))
        if not isinstance(labels, Tensor):
            raise UserError(f"labels are a {type(labels).__name__}, not a tensor; give the loader a collate_fn")
        return labels

    def scores(self, output: Any) -> Tensor:
        """The tensor of an output that is to be measured."""
        if self.output is not None:
            found = _of_output(output, self.output)
        elif isinstance(output, Tensor):
            found = output
        else:
            found = next((part for key in ("logits", "out") if (part := _named(output, key)) is not None), None)
        if not isinstance(found, Tensor):
            raise UserError(f"the network gives {_described(output)}; say where its logits are by output=")
        if not found.is_floating_point():
            raise UserError(f"the network gives {found.dtype}, not scores of classes; let it return its logits")
        return found

    def _inputs(self, batch: Any) -> Key | tuple[Key, ...]:
        self._check(batch)
        if self.inputs is not None:
            return self.inputs
        if not isinstance(batch, Mapping):
            return 0
        return tuple(key for key in batch if key != self._labels(batch))

    def _labels(self, batch: Any) -> Key:
        if self.labels is not None:
            return self.labels
        return "labels" if isinstance(batch, Mapping) else 1

    def _check(self, batch: Any) -> None:
        """UserError for a batch where inputs and labels cannot be told apart."""
        said = self.inputs is not None and self.labels is not None
        if isinstance(batch, Mapping):
            if self.labels is None and "labels" not in batch:
                raise UserError(f"the batch has no 'labels' among its keys {_keys(batch)}; say which by labels=")
        elif not isinstance(batch, list | tuple) or (len(batch) != 2 and not said):
            raise UserError(
                f"the batch is {_described(batch)}, not (inputs, labels); say which is which by inputs= and labels="
            )


def widened(scores: Tensor) -> Tensor:
    """Half precision as float32, because sums of many losses need more digits than it has."""
    return scores.float() if scores.element_size() < 4 else scores


def double(value: Tensor) -> Tensor:
    """float64, or float32 on a device that has no other (mps)."""
    return value.float() if value.device.type == "mps" else value.double()


def _part(batch: Any, key: Key) -> Any:
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"the batch, {_described(batch)}, has no part {key!r}; fix inputs= or labels=") from None


def _arguments(part: Any) -> Example:
    """One part of a batch as arguments of a network: a list becomes a tuple of arguments, a dict keyword arguments."""
    if isinstance(part, Mapping):
        return dict(part)
    return tuple(part) if isinstance(part, list) else part


def _of_output(output: Any, key: Key) -> Any:
    found = _named(output, key)
    if found is None:
        raise UserError(f"the network gives {_described(output)}, which has no {key!r}; fix output=")
    return found


def _named(output: Any, key: Key) -> Any:
    if isinstance(output, Mapping):
        return output.get(key)
    if isinstance(output, list | tuple) and isinstance(key, int):
        return output[key] if -len(output) <= key < len(output) else None
    return getattr(output, key, None) if isinstance(key, str) else None


def _described(thing: Any) -> str:
    kind = type(thing).__name__
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}"
    if isinstance(thing, Mapping):
        return f"a {kind} of {_keys(thing)}"
    return f"a {kind} of {len(thing)} parts" if isinstance(thing, list | tuple) else f"a {kind}"


def _keys(mapping: Mapping) -> str:
    return ", ".join(repr(key) for key in mapping) or "nothing"
