"""The kinds of classification: how scores and labels become one formula, and what else is summed up.

Every kind becomes scores (N, K, *places) with labels (N, *places) int64, or (N, K) rows of probabilities. A single
score x, as binary and multi-label outputs have it, becomes the pair (0, x): argmax is then the threshold 0, and
cross-entropy is binary cross-entropy. A single probability p becomes the pair (1 - p, p).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .task import widened

BASE = ("n", "counted", "right", "loss")  # sums that every kind has: samples; labels that count; right ones; nats


@dataclass(frozen=True)
class Kind:
    """One kind of classification.

    says: the shapes of outputs and labels, for people
    pairs: may a single score stand for two classes?
    one_label: has a sample one label, so that classes exclude each other?
    extra: (classes) -> how many sums beyond BASE; add: (scores, answers, labels, which count) -> these sums; answers
        are the argmax of the scores, None for "which count" means all
    read: (sums of BASE, these sums, ignored label) -> values of further metrics
    """

    says: str
    pairs: bool = False
    one_label: bool = True
    metrics: tuple[str, ...] = ("acc", "loss")
    extra: Callable[[int], int] = field(default=lambda classes: 0)
    add: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None
    read: Callable[[Tensor, Tensor, int | None], Mapping[str, float]] = field(default=lambda base, sums, ignored: {})


def add_exact(scores: Tensor, answers: Tensor, labels: Tensor, counts: Tensor | None) -> Tensor:
    """(1,) how many samples have every label right that counts."""
    right = answers == labels
    return (right if counts is None else right | ~counts).flatten(1).all(1).sum()[None]


def read_exact(base: Tensor, sums: Tensor, ignored: int | None) -> dict[str, float]:
    return {"exact": fraction(sums[0], base[0])}


def add_confusion(scores: Tensor, answers: Tensor, labels: Tensor, counts: Tensor | None) -> Tensor:
    """(K * K,) how many pixels have each pair of label and answer."""
    if counts is not None:
        answers, labels = answers[counts], labels[counts]
    return multiclass_confusion_matrix(answers, labels, scores.shape[1], validate_args=False).flatten()


def read_miou(base: Tensor, sums: Tensor, ignored: int | None) -> dict[str, float]:
    """Intersection over union, mean over the classes that occur, equal to torchmetrics' MulticlassJaccardIndex."""
    classes = round(len(sums) ** 0.5)
    confusion = sums.reshape(classes, classes)
    both = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - both
    occurs = union > 0
    if ignored is not None and 0 <= ignored < classes:
        occurs[ignored] = False
    return {"miou": fraction((both[occurs] / union[occurs]).sum(), occurs.sum())}


def fraction(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else float("nan")


KINDS = {
    "multiclass": Kind("(N, C) outputs with (N,) integer labels"),
    "onehot": Kind("(N, C) outputs with (N, C) one-hot labels"),
    "mixed": Kind("(N, C) outputs with (N, C) labels whose rows sum to 1"),
    "binary": Kind("(N,) or (N, 1) outputs with (N,) or (N, 1) labels of 0 and 1", pairs=True),
    "multilabel": Kind(
        "(N, C) outputs with (N, C) labels of 0 and 1",
        pairs=True,
        one_label=False,
        metrics=("acc", "loss", "exact"),
        extra=lambda classes: 1,
        add=add_exact,
        read=read_exact,
    ),
    "dense": Kind(
        "(N, C, *places) outputs with (N, *places) integer labels",
        pairs=True,
        one_label=False,
        metrics=("miou", "acc", "loss"),
        extra=lambda classes: classes**2,
        add=add_confusion,
        read=read_miou,
    ),
}


def pairs(scores: Tensor, probabilities: bool) -> Tensor:
    """(N, 2, *places) of single scores (N, *places)."""
    return torch.stack([1 - scores if probabilities else torch.zeros_like(scores), scores], 1)


def columns(kind: str, scores: Tensor, probabilities: bool) -> Tensor:
    """(N, K, *places) scores from the network's (N,), (N, C) or (N, C, *places)."""
    if kind == "multilabel":
        return pairs(scores, probabilities)
    if KINDS[kind].pairs and (scores.ndim == 1 or scores.shape[1] == 1):
        return pairs(scores if scores.ndim == 1 else scores.squeeze(1), probabilities)
    return scores


def logits(scores: Tensor, probabilities: bool) -> Tensor:
    """Scores whose softmax is the network's answer. No log is below -100, as in torch's binary_cross_entropy."""
    return widened(scores).clamp(min=math.exp(-100)).log() if probabilities else scores


def target(labels: Tensor, scores: Tensor) -> Tensor:
    """(N, *places) int64 labels, or (N, K) probabilities, for scores (N, K, *places)."""
    if labels.shape == scores.shape:
        return labels
    if labels.ndim == scores.ndim and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    return labels.long()
