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
    try:
        parts = train_test_split(everything.numpy(), test_size=fraction, stratify=labels.numpy(), random_state=seed)
    except ValueError as error:
        raise UserError(f"cannot split {len(labels)} pictures by {fraction}: {error}") from error
    train, val = (torch.from_numpy(part).sort().values for part in parts)
    return train, val
