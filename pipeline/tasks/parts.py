"""Losses over many classes, by parts of the rows: a language model's logits are its largest tensor by far."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PART = 2**24  # numbers of logits whose loss is computed at once


def by_parts(lesson: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """(rows, ...): lesson(logits, *others), which gives as much for each row, by parts that the backward pass computes
    again.

    Over 49,152 words the loss and its gradient take twice the memory of the logits so, and five times it as a whole.
    """
    size = max(1, PART // logits.shape[1])
    if len(logits) <= size:
        return lesson(logits, *others)
    parts = zip(*(one.split(size) for one in (logits, *others)), strict=True)
    return torch.cat([checkpoint(lesson, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
