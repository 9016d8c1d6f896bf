"""Compression as a projection of channel groups (arXiv:2502.10216, eq. 3-5; "Cut Less, Fold More", section 3).

With M = onehot(labels), (C, k), the projector P = M (MᵀM)⁻¹ Mᵀ is orthogonal. Pruning uses every label once; folding
gives every channel a label. Writers take the cluster mean, (MᵀM)⁻¹ Mᵀ W; readers take the cluster sum, V M. So
V P W = merge(V, sum) @ merge(W, mean), and exact duplicates merge without loss whatever the sizes of their clusters.
Where pictures are at hand, readers are solved anew instead (compensate.py).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.compression.choose.cluster import kept_energy


@dataclass(frozen=True)
class Sums:
    """Sums of entries along an axis: those that stay, in their order, and those that are added to one of them.

    stays: (k,) entries that stay; added: (n,) entries that are added; to: (n,), the place in `stays` that each of these
        is added to. All int64.
    """

    stays: Tensor
    added: Tensor
    to: Tensor

    @classmethod
    def of(cls, into: Tensor) -> "Sums":
        """into: (size,) int64, the entry that each entry is added to, itself where it stays; -1: dropped."""
        stays = into == torch.arange(len(into))
        added = (~stays & (into >= 0)).nonzero().squeeze(1)
        return cls(stays.nonzero().squeeze(1), added, (stays.cumsum(0) - 1)[into[added]])


@dataclass(frozen=True)
class Projection:
    """labels: (C,) int64, the new channel of each old one, -1 = dropped.

    chosen: (k,) int64, the member that stands for each cluster; None: writers take the mean of all members.
    scales: (C,), how much of its representative a channel is: readers take scales * channel; None: 1 for all.

    Labels are renumbered so that new channels stand in the order of their representatives, which are the first members
    unless they are chosen. Raises ValueError for labels that keep no channel or leave out a number.
    """

    labels: Tensor
    chosen: Tensor | None = None
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        labels = self.labels.detach().cpu().long()
        if labels.dim() != 1 or not (labels >= 0).any():
            raise ValueError(f"labels must be a (C,) tensor that keeps at least one channel, got {labels}")
        first = first_members(labels)
        if (first == len(labels)).any():
            raise ValueError(f"labels must use every number from 0 to {len(first) - 1}")
        if self.chosen is not None:
            if not torch.equal(labels[self.chosen], torch.arange(len(first))):
                raise ValueError("chosen must name one member of every cluster")
            first = self.chosen.cpu()
        rank = torch.from_numpy(first.numpy().argsort().argsort())
        object.__setattr__(self, "labels", torch.where(labels >= 0, rank[labels.clamp(min=0)], -1))
        object.__setattr__(self, "chosen", None if self.chosen is None else first.sort().values)

    @cached_property
    def counts(self) -> Tensor:
        """Cluster sizes, (k,) int64."""
        labels = self.labels.numpy()  # for a few hundred numbers NumPy takes a tenth of torch's time
        return torch.from_numpy(np.bincount(labels[labels >= 0]))

    @cached_property
    def representatives(self) -> Tensor:
        """One channel of every cluster, ascending, (k,) int64: where the new channel will stand."""
        return first_members(self.labels) if self.chosen is None else self.chosen

    @cached_property
    def into(self) -> Tensor:
        """The representative of every channel's cluster, -1 = dropped, (C,) int64."""
        return torch.where(self.labels >= 0, self.representatives[self.labels], -1)

    @cached_property
    def sums(self) -> Sums:
        """The sums of channels that merging computes."""
        return Sums.of(self.into)

    @property
    def is_identity(self) -> bool:
        return len(self.counts) == len(self.labels)

    def onehot(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """M: (C, k)."""
        return (self.labels[:, None] == torch.arange(len(self.counts))).to(dtype)

    def matrix(self) -> Tensor:
        """The projector P = M (MᵀM)⁻¹ Mᵀ: (C, C) float64."""
        m = self.onehot()
        return m / self.counts @ m.T


def first_members(labels: Tensor) -> Tensor:
    """The first channel of every label, (k,) int64, of labels (C,) int64; C for a number that none has."""
    own = labels.numpy()
    first = np.full(own.max() + 1, len(own))
    kept = np.flatnonzero(own >= 0)[::-1]
    first[own[kept]] = kept  # of several, the last that is written stands
    return torch.from_numpy(first)


def merge(tensor: Tensor, projection: Projection, reduce: str, dim: int = 0) -> Tensor:
    """Cluster means ("mean") or sums ("sum") along `dim`, of size C before and k after."""
    merged = weighted_sum(tensor, projection.sums, None, dim)
    if reduce == "mean":
        merged = merged / projection.counts.to(tensor.device).view(along(dim, tensor))
    return merged.to(tensor.dtype)


def weighted_sum(tensor: Tensor, sums: Sums, weights: Tensor | None = None, dim: int = 0) -> Tensor:
    """The sums along `dim`, each entry times its weight.

    weights: (size,), or None for ones. Half precision comes out as float32, as it would lose the small terms of sums.
    """
    device, wide = tensor.device, wide_dtype(tensor)

    def taken(entries: Tensor) -> Tensor:
        chosen = tensor.index_select(dim, entries.to(device)).to(wide)
        if weights is not None:
            chosen *= weights.to(device, wide)[entries.to(device)].view(along(dim, tensor))
        return chosen

    # Entries that stay are copied and only the others are added: most clusters are single channels.
    merged = taken(sums.stays)
    return merged.index_add_(dim, sums.to.to(device), taken(sums.added)) if len(sums.added) else merged


def wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def reconstruction_error(gram: Tensor, projection: Projection) -> float:
    """Relative parameter error ‖W - P W‖ / ‖W‖ from the Gram matrix W Wᵀ (C, C) alone; dropped rows count whole."""
    if projection.is_identity:
        return 0.0
    total = float(gram.diagonal().double().sum())
    kept = kept_energy(gram.cpu().numpy(), projection.labels.numpy())
    return (max(total - kept, 0.0) / total) ** 0.5 if total > 0 else 0.0


def along(dim: int, tensor: Tensor) -> list[int]:
    """The shape in which a vector stands along `dim` of the tensor."""
    return [-1 if d == dim else 1 for d in range(tensor.dim())]
