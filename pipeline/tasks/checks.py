"""Refuses batches and outputs that no classification can measure: each error names the values and the fix."""

import torch
from torch import Tensor

from pipeline.tables import UserError

from .kinds import KINDS


def kind_of(scores: Tensor, labels: Tensor) -> str:
    """The kind of classification that these (N, ...) scores and labels look like; see `check_labels` for proof."""
    if scores.ndim > 2:
        return "dense"
    if scores.ndim < 2 or scores.shape[1] == 1:
        return "binary"
    if labels.shape != scores.shape:
        return "multiclass"
    if zero_or_one(labels):
        return "onehot" if bool((labels.sum(1) == 1).all()) else "multilabel"
    return "mixed"


def classes_of(kind: str, scores: Tensor) -> int:
    """How many classes the scores are for; multi-label scores: how many labels."""
    return 2 if kind != "multilabel" and alone(kind, scores) else scores.shape[1]


def check_labels(kind: str, scores: Tensor, labels: Tensor, ignored: int | None) -> None:
    """UserError unless the labels are of this kind and fit the scores. ignored: label that is left out."""
    check_shapes(kind, scores, labels)
    if kind == "mixed":
        check_mixed(labels)
    elif kind == "onehot":
        check_one_hot(labels)
    else:
        single = alone(kind, scores)
        check_range(labels, 2 if single else scores.shape[1], ignored, single)


def check_shapes(kind: str, scores: Tensor, labels: Tensor) -> None:
    samples, places = scores.shape[:1], scores.shape[2:]
    if kind in ("mixed", "onehot", "multilabel"):
        fits = scores.ndim == 2 and labels.shape == scores.shape
    else:
        dims = {"multiclass": (2,), "binary": (1, 2)}.get(kind, tuple(range(3, 9)))
        wide = kind == "binary" and scores.ndim == 2 and scores.shape[1] != 1
        fits = scores.ndim in dims and not wide and labels.shape in ((*samples, *places), (*samples, 1, *places))
    if not fits:
        raise UserError(
            f"outputs {tuple(scores.shape)} and labels {tuple(labels.shape)} {labels.dtype} cannot be compared as "
            f"{kind} classification: {KINDS[kind].says}; {_fix(scores, labels)}"
        )


def _fix(scores: Tensor, labels: Tensor) -> str:
    if scores.ndim == 0 or labels.ndim == 0 or len(labels) != len(scores):
        return "give every sample one output and one label"
    if labels.ndim == 1 and scores.ndim > 2:
        return "flatten the outputs to (N, C) in the network"
    if labels.ndim > 2 and scores.ndim > 2 and labels.shape[-2:] != scores.shape[-2:]:
        return "resize the outputs to the labels in the network"
    return "reshape the labels in the loader, say kind=, or pass another task"


def check_range(labels: Tensor, classes: int, ignored: int | None, single: bool) -> None:
    """UserError for labels outside 0 ... classes - 1. single: one score a label, where whole floats are labels too."""
    whole = not labels.is_floating_point() and not labels.is_complex()
    if not whole and not (single and bool((labels == labels.round()).all())):
        raise UserError(
            f"labels are {labels.dtype} such as {labels.flatten()[0].item():.4g}, not classes; "
            "give integers (labels.long()), or pass another task for targets of a regression"
        )
    wrong = (labels < 0) | (labels >= classes)
    if ignored is not None:
        wrong &= labels != ignored
    if bool(wrong.any()):
        value = int(labels[wrong][0])
        raise UserError(
            f"label {value} is none of the {classes} classes 0 ... {classes - 1} of the network; "
            f"pass ignore_index={value} to leave such labels out, or number the classes from 0"
        )


def check_mixed(labels: Tensor) -> None:
    if not bool((labels >= 0).all()) or not sum_to_one(labels, 1):
        raise UserError(
            f"labels {tuple(labels.shape)} {labels.dtype} are neither 0 and 1 nor rows that sum to 1, so not classes; "
            "pass another task for targets of a regression"
        )


def check_one_hot(labels: Tensor) -> None:
    if not zero_or_one(labels):
        raise UserError(
            "labels were one-hot before, and this batch's are not; say kind='mixed' if they are probabilities"
        )
    if not bool((labels.sum(1) == 1).all()):
        raise UserError(
            "labels were one-hot before, and this batch's are not; say kind='multilabel' if several may be 1"
        )


def check_classes(found: int, classes: int | None) -> None:
    if classes is not None and found != classes:
        raise UserError(f"the network says {found} classes and the task {classes}; fix classes= or the network's head")


def check_outputs(kind: str, scores: Tensor, outputs: str | None) -> None:
    """UserError for scores that are called probabilities and are none."""
    if outputs == "probabilities" and not probable(kind, scores):
        raise UserError(
            f"outputs are taken for probabilities, and this batch holds {_worst(scores):.4g}; say outputs='logits'"
        )


def outputs_of(kind: str, scores: Tensor) -> str:
    """ "logits" or "probabilities", whichever the scores are. UserError where both fit and give different numbers."""
    if not probable(kind, scores):
        return "logits"
    if alone(kind, scores):
        raise UserError(
            "all outputs lie in 0 ... 1, where the threshold is 0 for logits and 0.5 for probabilities; "
            "say outputs='logits' or outputs='probabilities'"
        )
    return "probabilities"


def alone(kind: str, scores: Tensor) -> bool:
    """Does each score stand alone, for its label or not, with no other scores that it would sum to 1 with?"""
    return kind == "multilabel" or (KINDS[kind].pairs and (scores.ndim < 2 or scores.shape[1] == 1))


def probable(kind: str, scores: Tensor) -> bool:
    """Could the scores be probabilities?"""
    if not bool(((scores >= 0) & (scores <= 1 + tolerance(scores))).all()):
        return False
    return alone(kind, scores) or sum_to_one(scores, 1)


def sum_to_one(rows: Tensor, dim: int) -> bool:
    return bool(((rows.double() if rows.device.type != "mps" else rows).sum(dim) - 1).abs().le(tolerance(rows)).all())


def tolerance(values: Tensor) -> float:
    """How far a sum of many rounded values may be from 1."""
    return 1e-4 if values.element_size() >= 4 else 3e-2


def zero_or_one(labels: Tensor) -> bool:
    return labels.dtype == torch.bool or bool(((labels == 0) | (labels == 1)).all())


def _worst(scores: Tensor) -> float:
    return max(scores.min().item(), scores.max().item(), key=lambda value: abs(value - 0.5))
