"""Stratified splits that depend on the labels and a seed alone."""

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from pipeline.tables import UserError


def split(labels: Tensor, fraction: float | int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (train_idx, val_idx), int64 and ascending, with every class shared out in proportion.

    labels: (N,) int64
    fraction: share of val_idx, 0 <= fraction < 1, or its size as an int
    """
    everything = torch.arange(len(labels))
    if fraction == 0:
        return everything, everything[:0]
    counts = torch.bincount(labels)
    least, rarest = int(counts[counts > 0].min()), int(counts.masked_fill(counts == 0, len(labels) + 1).argmin())
    if least < 2:
        raise UserError(f"class {rarest} has one picture, which cannot be in both parts; add another, or leave it out")
    size = fraction if isinstance(fraction, int) else round(fraction * len(labels))
    kinds = int((counts > 0).sum())
    if not kinds <= size <= len(labels) - kinds:
        raise UserError(
            f"a part of {size} of {len(labels)} pictures leaves one side without all {kinds} classes; "
            "change data.val_fraction, data.train_size or data.test_size"
        )
    try:
        parts = train_test_split(everything.numpy(), test_size=fraction, stratify=labels.numpy(), random_state=seed)
    except ValueError as error:
        raise UserError(f"cannot split {len(labels)} pictures by {fraction}: {error}") from error
    train, val = (torch.from_numpy(part).sort().values for part in parts)
    return train, val
