"""Classification of samples or of places in them: multi-class, one-hot, mixed, binary, multi-label and dense."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.tables import UserError, pick

from .checks import check_classes, check_labels, check_outputs, classes_of, kind_of, outputs_of
from .kinds import BASE, KINDS, Kind, columns, fraction, logits, target
from .task import IGNORED, Example, Key, Layout, Task, double, widened

OUTPUTS = ("logits", "probabilities")


class Classification(Task):
    """Accuracy and cross-entropy of a network that says classes.

    kind: of KINDS; None: decided on the first batch (see `settled`). "multiclass" also trains on labels that are rows
        of probabilities, which mixed training pictures have
    outputs: "logits" or "probabilities"; None: decided on the first batch
    output: index, key or attribute of the logits in an output that is no tensor; None: "logits" or "out"
    inputs, labels: index or key in a batch, several inputs as a tuple; None: the first and second of a pair; in a dict,
        "labels" are the labels and all other keys the inputs, as keyword arguments
    ignore_index: label that is left out of every number
    classes: how many; None: as many as the first output has
    """

    name = "classification"

    def __init__(
        self,
        kind: str | None = None,
        outputs: str | None = None,
        output: Key | None = None,
        inputs: Key | tuple[Key, ...] | None = None,
        labels: Key | None = None,
        ignore_index: int | None = None,
        classes: int | None = None,
    ) -> None:
        for what, table, value in (("kind of classification", KINDS, kind), ("outputs", OUTPUTS, outputs)):
            if value is not None:
                pick(what, dict.fromkeys(table), value)
        self.kind, self.outputs, self.classes, self.ignore_index = kind, outputs, classes, ignore_index
        self.layout = Layout(inputs, labels, output)

    def __repr__(self) -> str:
        return f"Classification(kind={self.kind!r}, outputs={self.outputs!r}, classes={self.classes})"

    @property
    def metrics(self) -> tuple[str, ...]:
        return self._kind.metrics

    @property
    def size(self) -> int:
        return len(BASE) + self._kind.extra(self.classes or 0)

    @property
    def chance(self) -> float | None:
        """1 / classes, whatever their frequencies; None for other headlines and for several labels."""
        if not self._kind.one_label or self.classes is None:
            return None
        return 1 / max(2, self.classes)  # a single score stands for two classes

    def inputs(self, batch: Any) -> Example:
        return self.layout.example(batch)

    def settled(self, output: Any, batch: Any) -> "Classification":
        scores, labels = self.layout.scores(output), self.layout.target(batch)
        kind = self.kind or kind_of(scores, labels)
        check_labels(kind, scores, labels, self.ignore_index)
        outputs = self.outputs or outputs_of(kind, scores)
        check_outputs(kind, scores, outputs)
        classes, layout = classes_of(kind, scores), self.layout
        check_classes(classes, self.classes)
        return Classification(kind, outputs, layout.output, layout.inputs, layout.labels, self.ignore_index, classes)

    def check(self, output: Any, batch: Any) -> None:
        kind, scores = self._named_kind, self.layout.scores(output)
        check_labels(kind, scores, self.layout.target(batch), self.ignore_index)
        check_classes(classes_of(kind, scores), self.classes)
        check_outputs(kind, scores, self.outputs)

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        scores = self._columns(self.layout.scores(output))
        labels = target(self.layout.target(batch), scores)
        return self._cross_entropy(scores, labels, "mean", label_smoothing)

    def totals(self, output: Any, batch: Any) -> Tensor:
        scores = self._columns(widened(self.layout.scores(output)))
        labels = target(self.layout.target(batch), scores)
        rows = labels.shape == scores.shape
        hard, answers = labels.argmax(1) if rows else labels, scores.argmax(1)
        counts = None if rows or self.ignore_index is None else hard != self.ignore_index
        right = answers == hard
        device = scores.device
        sums = [
            torch.full((), len(hard), device=device),  # a number from the host would make the device wait
            torch.full((), hard.numel(), device=device) if counts is None else counts.sum(),
            (right if counts is None else right & counts).sum(),
            self._cross_entropy(scores, labels, "sum"),
        ]
        base = torch.stack([double(value) for value in sums])
        if self._kind.add is None:
            return base
        return torch.cat([base, double(self._kind.add(scores, answers, hard, counts))])

    def values(self, totals: Tensor) -> dict[str, float]:
        totals = totals.detach().cpu().double()
        base, more = totals[: len(BASE)], totals[len(BASE) :]
        _, counted, right, loss = base
        found = {"acc": fraction(right, counted), "loss": fraction(loss, counted)}
        found.update(self._kind.read(base, more, self.ignore_index))
        return {name: found[name] for name in self.metrics}

    def count(self, totals: Tensor) -> int:
        return int(totals[0])

    def answers(self, output: Any) -> Tensor:
        scores = self._columns(widened(self.layout.scores(output)))
        return logits(scores, self._probabilities).movedim(1, -1).flatten(0, -2)

    def targets(self, output: Any, batch: Any) -> Tensor:
        scores = self._columns(self.layout.scores(output))
        labels = target(self.layout.target(batch), scores)
        hard = (labels.argmax(1) if labels.shape == scores.shape else labels).flatten()
        return hard if self.ignore_index is None else hard.masked_fill(hard == self.ignore_index, IGNORED)

    @property
    def _probabilities(self) -> bool:
        return self.outputs == "probabilities"

    @property
    def _named_kind(self) -> str:
        if self.kind is None:
            raise UserError(f"the kind of classification is not known yet; say kind=, one of: {', '.join(KINDS)}")
        return self.kind

    @property
    def _kind(self) -> Kind:
        return KINDS[self._named_kind]

    def _columns(self, scores: Tensor) -> Tensor:
        return columns(self._named_kind, scores, self._probabilities)

    def _cross_entropy(self, scores: Tensor, labels: Tensor, reduction: str, label_smoothing: float = 0.0) -> Tensor:
        """scores: (N, K, *places), labels: (N, *places) int64 or (N, K) probabilities"""
        scores = logits(scores, self._probabilities)
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
        if labels.shape == scores.shape:
            # Cross-entropy needs one type: mixed labels may be wider than logits, and one-hot ones are often integers.
            dtype = torch.promote_types(labels.dtype, scores.dtype)
            scores, labels = scores.to(dtype), labels.to(dtype)
        elif self.ignore_index is not None:
            options["ignore_index"] = self.ignore_index
        return F.cross_entropy(scores, labels, **options)


def of_pictures(
    classes: int, channels: int, kind: str = "multiclass", outputs: str = "logits", ignore_index: int | None = None
) -> Classification:
    """The task of a network for `classes` classes, known before the first batch."""
    return Classification(kind, outputs, ignore_index=ignore_index, classes=classes)
