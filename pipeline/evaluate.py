"""The only evaluation loop."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Metrics:
    """Sums over pictures, so that the parts of several processes add up."""

    correct: float = 0.0
    loss_sum: float = 0.0
    n: float = 0.0

    @property
    def acc(self) -> float:
        """Fraction of pictures whose largest logit is the label's, 0 ... 1."""
        return self.correct / self.n

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.loss_sum / self.n


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Metrics:
    """Accuracy and loss over (inputs, labels (B,) int64) batches that lie on the model's device. Keeps the mode."""
    training = model.training
    model.eval()
    sums: Tensor | None = None
    n = 0
    for inputs, labels in batches:
        logits = model(inputs).float()
        found = torch.stack(
            [(logits.argmax(1) == labels).sum().double(), F.cross_entropy(logits, labels, reduction="sum").double()]
        )
        sums = found if sums is None else sums + found  # stays on the device: one synchronisation at the end
        n += len(labels)
    model.train(training)
    if sums is None:
        return Metrics()
    return Metrics(*sums.tolist(), n)
