"""Distillation: a task around a task, trained on the answers of a teacher beside the labels, or in their place.

The teacher sees the same batch as the network that learns. It is a function, so it is part of no module and of no
checkpoint. Measuring stays that of the inner task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.tables import UserError, pick

from .parts import by_parts
from .task import IGNORED, Example, Task

SMALLEST = 1e-7  # added to a standard deviation, as the authors' code does
LEAST = 3  # classes that standardised logits can tell apart: of two, they are always -1 and 1


def response(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(rows,) T² KL(softmax(teacher / T) || softmax(student / T)); arXiv:1503.02531, section 2.

    T² keeps the gradient's magnitude that of hard labels. student, teacher: (rows, classes) logits
    """
    said, taught = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    return temperature**2 * (taught.exp() * (taught - said)).sum(1)


def standardized(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`response` of logits with mean 0 and deviation 1 in every row, so that magnitudes need not agree.

    arXiv:2403.01427, algorithm 1. Raises UserError for fewer than LEAST classes.
    """
    if student.shape[1] < LEAST:
        raise UserError(f"loss=standardized needs at least {LEAST} classes, and there are {student.shape[1]}: use kl")
    return response(standard(student), standard(teacher), temperature)


def standard(logits: Tensor) -> Tensor:
    """(rows, classes), each row with mean 0 and standard deviation 1."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + SMALLEST)


class Decoupled(NamedTuple):
    """(rows,) each: the two parts of a KL; sure: the teacher's probability of the target class."""

    target: Tensor
    others: Tensor
    sure: Tensor


def decoupled(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Decoupled:
    """TCKD (target class against all others) and NCKD (the others among themselves); arXiv:2203.08679, eq. 5 to 7.

    KL = target + (1 - sure) * others. student, teacher: (rows, classes) logits; targets: (rows,) int64
    """
    at = F.one_hot(targets, student.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of (target, not target), (rows, 2), and of each other class among the others."""
        logits = logits / temperature
        others = logits.masked_fill(at, -torch.inf)
        pair = torch.stack([logits[at], others.logsumexp(1)], 1).log_softmax(1)
        # The target's own place is 0 in both, so that no difference of infinities arises.
        return pair, others.log_softmax(1).masked_fill(at, 0.0)

    (said, said_others), (taught, taught_others) = parts(student), parts(teacher)
    others = taught_others.exp().masked_fill(at, 0.0) * (taught_others - said_others)
    return Decoupled((taught.exp() * (taught - said)).sum(1), others.sum(1), taught[:, 0].exp())


# By name: (student, teacher, temperature) -> (rows,). dkd also needs targets and beta; see `Distilled.taught`.
RESPONSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"kl": response, "standardized": standardized}
DKD = "dkd"
LOSSES = (*RESPONSES, DKD)


@dataclass(frozen=True)
class Distilled(Task):
    """Trains on (1 - labels) * what the teacher says + labels * the inner task's loss; arXiv:1503.02531, section 2.

    Hidden layers are a lesson of their own: features * hints() is added (see stages.features).

    task: settled; measures as before. teacher: batch -> its output, in eval mode and without gradients.
    loss: of LOSSES: "kl"; "standardized"; "dkd" (arXiv:2203.08679), T² (target + beta * others), which sees labels.
    labels: the share of the loss on hard labels, 0 <= labels < 1; at 0 no label is looked at, unless by dkd.
    hints: () loss of the features of the last forward passes of network and teacher; features: its weight.
    """

    task: Task
    teacher: Callable[[Any], Any]
    response: str = "kl"
    temperature: float = 4.0
    labels: float = 0.0
    beta: float = 8.0
    features: float = 0.0
    hints: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        pick("loss", dict.fromkeys(LOSSES), self.response)

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.task.metrics

    @property
    def size(self) -> int:
        return self.task.size

    @property
    def chance(self) -> float | None:
        return self.task.chance

    def inputs(self, batch: Any) -> Example:
        return self.task.inputs(batch)

    def settled(self, output: Any, batch: Any) -> "Distilled":
        self.check(output, batch)
        return self

    def check(self, output: Any, batch: Any) -> None:
        self.task.check(output, batch)
        self.both(output, batch)

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        loss = self.taught(output, batch).mean()
        if self.labels:
            loss = (1 - self.labels) * loss + self.labels * self.task.loss(output, batch, label_smoothing)
        return loss if self.hints is None else loss + self.features * self.hints()

    def totals(self, output: Any, batch: Any) -> Tensor:
        return self.task.totals(output, batch)

    def values(self, totals: Tensor) -> dict[str, float]:
        return self.task.values(totals)

    def count(self, totals: Tensor) -> int:
        return self.task.count(totals)

    def answers(self, output: Any) -> Tensor:
        return self.task.answers(output)

    def real(self, batch: Any) -> Tensor | None:
        return self.task.real(batch)

    def targets(self, output: Any, batch: Any) -> Tensor:
        return self.task.targets(output, batch)

    def taught(self, output: Any, batch: Any) -> Tensor:
        """(n,) the loss of every row that counts."""
        student, teacher = self.both(output, batch)
        if self.response != DKD:
            real = self.task.real(batch)
            rows = slice(None) if real is None else real
            lesson = RESPONSES[self.response]
            return by_parts(lambda own, told: lesson(own, told, self.temperature), student[rows], teacher[rows])
        targets = self.task.targets(output, batch)
        rows = targets != IGNORED
        return by_parts(self.dkd, student[rows], teacher[rows], targets[rows])

    def dkd(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """(rows,) T² (TCKD + beta NCKD); arXiv:2203.08679, equation 8."""
        found = decoupled(student, teacher, targets, self.temperature)
        return self.temperature**2 * (found.target + self.beta * found.others)

    def both(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """The answers of student and teacher, (rows, classes) each. UserError where they are of other shapes."""
        with torch.no_grad():
            teacher = self.task.answers(self.teacher(batch))
        student = self.task.answers(output)
        check_alike(student, teacher)
        return student, teacher


def check_alike(student: Tensor, teacher: Tensor) -> None:
    """UserError where two networks' answers are of other classes or of other rows."""
    for what, i in (("classes", 1), ("rows", 0)):
        if student.shape[i] != teacher.shape[i]:
            raise UserError(
                f"the teacher says {teacher.shape[i]} {what} and the network {student.shape[i]}; "
                f"choose a teacher of the same {what}"
            )
