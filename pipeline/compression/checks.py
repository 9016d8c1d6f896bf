"""Refusals before a compression begins, each one line that says how it is mended."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import nn

from pipeline.compression.choose.layers import check_beginning
from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.tables import UserError


def protected(groups: ChannelGroups, names: Sequence[str]) -> list[ChannelGroup]:
    """The groups whose name begins with one of these. Raises UserError for one with which no group's name begins."""
    for name in names:
        check_beginning(f"protect: no group's name begins with {name!r}", name, [group.name for group in groups])
    return [group for group in groups if group.name.startswith(tuple(names))]


def check_groups(model: nn.Module, groups: ChannelGroups) -> None:
    """Raise UserError, naming frozen channels and why, where there is no group."""
    if not len(groups):
        frozen = "; ".join(map(str, groups.frozen[:3]))
        raise UserError(f"{type(model).__name__} has no channels that can be compressed ({frozen})")


def check_round_to(groups: ChannelGroups, round_to: int) -> None:
    """Raise UserError where no group has more channels than that, so that none could ever go."""
    largest = max(group.size for group in groups)
    if round_to >= largest:
        raise UserError(f"round_to {round_to} leaves all groups whole: the largest has {largest} channels; lower it")


def check_ratios(ratios: Sequence[float], round_to: int = 1) -> None:
    """Raise UserError for a round_to below 1, and naming the first ratio outside 0 <= ratio < 1."""
    if round_to < 1:
        raise UserError(f"round_to {round_to} must be at least 1 channel")
    for ratio in ratios:
        if not isinstance(ratio, Real):
            raise UserError(f"ratio {ratio!r} is no number: the fraction to remove is 0 <= ratio < 1")
        if not 0 <= ratio < 1:
            raise UserError(f"ratio {ratio} is out of range: the fraction to remove is 0 <= ratio < 1")


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise UserError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        # A sum is finite only where all entries are; the entries of one that is not may be finite and large.
        if tensor.is_floating_point() and not (tensor.sum().isfinite() or tensor.isfinite().all()):
            kind = "NaN" if tensor.isnan().any() else "Inf"
            raise UserError(f"{name} holds {kind}: training has diverged (lower the learning rate); not compressed")
