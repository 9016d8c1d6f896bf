"""METHODS: how a channel group is made smaller. A method is a function of the group's tensors that returns labels.

    method(weights, sizes, **options) -> {k: Projection} for every size k in `sizes`

All sizes come in one call, so that what they share is computed once. Adding a method is one function here and one row
in METHODS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.compression.choose.cluster import (
    fold_labels,
    mixed_labels,
    special_folding,
    surgeon_order,
)
from pipeline.compression.choose.gradients import Gradients
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.merge.projection import Projection
from pipeline.tables import UserError

Projections = dict[int, Projection]


def fold(weights: GroupWeights, sizes: Sequence[int], *, refine: bool = True) -> Projections:
    """Merge similar channels: Ward's clusters, refined by single moves, never worse than the special folding.

    After model folding (Wang et al. 2025, arXiv:2502.10216), whose k-means this replaces. Gated channels fold onto
    representatives, chosen greedily so that they show most of the others.
    """
    if weights.group.gated:
        return {k: weights.represented(weights.by_greed[:k]) for k in sizes}
    labels = fold_labels(weights.similarity.numpy(), sizes, refine)
    return {k: Projection(torch.from_numpy(labels[k])) for k in sizes}


def keep_largest(scores: Tensor, sizes: Sequence[int]) -> Projections:
    """Prune to the k channels of largest score; the earlier channel wins a tie."""
    order = scores.argsort(descending=True, stable=True).cpu()
    projections = {}
    for k in sizes:
        kept = order[:k].sort().values
        labels = torch.full((len(scores),), -1)
        labels[kept] = torch.arange(k)
        projections[k] = Projection(labels)
    return projections


def weight_norm(weights: GroupWeights, sizes: Sequence[int], *, p: int, score: str = "first") -> Projections:
    """Keep the channels whose weights have the largest Lp norm (Li et al. 2017, arXiv:1608.08710).

    score: "first" looks at the group's first writer, as the study does; "group" sums |w|^p over all weights that write
    or read the channel (DepGraph, arXiv:2301.12900).
    """
    if score not in ("first", "group"):
        raise UserError(f"unknown score {score!r}; choose from: first, group")
    axes = weights.writers[:1] if score == "first" else [*weights.writers, *weights.group.reads]
    scores = torch.stack([weights.rows(a).abs().pow(p).sum(1) for a in axes]).sum(0)
    return keep_largest(scores, sizes)


def random(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Keep channels drawn by `seed` (the larger sizes contain the smaller)."""
    generator = torch.Generator().manual_seed(weights.seed)
    return keep_largest(torch.rand(weights.group.size, generator=generator), sizes)


def random_fold(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Merge channels drawn by `seed`, in clusters as even as can be: the gain of folding without a look at weights.

    Gated channels fold onto representatives drawn by `seed`.
    """
    order = torch.randperm(weights.group.size, generator=torch.Generator().manual_seed(weights.seed))
    if weights.group.gated:
        return {k: weights.represented(order[:k]) for k in sizes}
    labels = torch.empty_like(order)
    found = {}
    for k in sizes:
        labels[order] = torch.arange(len(order)) % k
        found[k] = Projection(labels)
    return found


def special(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """The folding of theorem 1 of "Cut Less, Fold More": all but the k - 1 largest channels become one.

    The k largest of gated channels are representatives.
    """
    if weights.group.gated:
        largest = weights.gram.diagonal().argsort(descending=True, stable=True)
        return {k: weights.represented(largest[:k]) for k in sizes}
    return {k: Projection(torch.from_numpy(special_folding(weights.gram.numpy(), k))) for k in sizes}


def mix(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Merge some channels and drop others: folding with one more cluster, around zero.

    No gated channel is dropped, for a multiple of another one is never worse than zero.
    """
    if weights.group.gated:
        return fold(weights, sizes)
    labels = mixed_labels(weights.similarity.numpy(), sizes)
    return {k: Projection(torch.from_numpy(labels[k])) for k in sizes}


def kmeans(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Merge by k-means (scikit-learn, k-means++ once), as the study does, but on our features: for comparison.

    UserError for gated channels, which have no means.
    """
    if weights.group.gated:
        raise UserError(f"kmeans needs means, and channels of {weights.group.name} are products of two: use fold")
    from sklearn.cluster import KMeans

    # Rows with the group's Gram matrix stand for its features: C of them instead of thousands.
    values, vectors = torch.linalg.eigh(weights.similarity.double())
    rows = (vectors * values.clamp(min=0).sqrt()).numpy()
    found = {}
    for k in sizes:
        labels = KMeans(k, n_init=1, random_state=weights.seed).fit(rows).labels_
        found[k] = Projection(torch.from_numpy(labels).long().unique(return_inverse=True)[1])
    return found


def geometric_median(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Drop the channels nearest to all others, which can replace them (FPGM, He et al. 2019, arXiv:1811.00250)."""
    rows = torch.cat([weights.rows(a) for a in weights.writers[:1]], 1)
    return keep_largest(torch.cdist(rows, rows).sum(1), sizes)


def norm_gain(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Keep the channels whose norm has the largest |gain| (network slimming, Liu et al. 2017, arXiv:1708.06519).

    A group without a norm of its own has no such gain: there the L2 norm decides.
    """
    gains = [n.weight for n in weights.group.norms if n.weight is not None]
    axes = [a for a in weights.group.writes if a.tensor in gains[:1]]
    if not axes:
        return weight_norm(weights, sizes, p=2)
    return keep_largest(weights.rows(axes[0]).abs().sum(1), sizes)


def wanda(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Keep the channels with the largest |weight| x activation in their readers (Sun et al. 2023, arXiv:2306.11695).

    The products are squared and summed over the channel. Without pictures every activation counts the same.
    """
    scores = weights.contributions.diagonal()
    return keep_largest(scores if weights.activations is None else scores * weights.activations.diagonal(), sizes)


def brain_surgeon(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Drop one channel after the other, each time the one whose loss the readers make up for best.

    Optimal brain surgeon (Hassibi and Stork 1992) for whole channels, as in ZipLM (arXiv:2302.04089): with the second
    moments H of the activations and readers V, dropping q and solving V anew costs ‖V_q‖² / (H⁻¹)_qq. Pictures give
    H; without them H is the Gram matrix, which linear channels with white inputs would have.
    """
    moments = weights.gram if weights.activations is None else weights.activations
    dropped = surgeon_order(moments.numpy(), weights.contributions.numpy())
    last = torch.empty(len(dropped))
    last[torch.from_numpy(dropped)] = torch.arange(len(dropped), dtype=last.dtype)
    return keep_largest(last, sizes)


def taylor(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Keep the channels without which the loss would change most, to first order: E[(Σ a dL/da)²] of activations a.

    The sum goes over all positions and all readers of the channel (Molchanov et al. 2019, arXiv:1906.10771, eq. 8, for
    gates; coupled channels as in group Fisher pruning, Liu et al. 2021, arXiv:2108.00708, eq. 6), the mean over
    pictures, with labels drawn from the network (see gradients.py). Raises UserError without pictures.
    """
    gates = gradients_of(weights, "taylor").gates
    slopes = [gates[axis.tensor, axis.axis][:, axis.index].sum(2) for axis in weights.group.reads]
    return keep_largest(torch.stack(slopes).sum(0).square().mean(0), sizes)


def fisher(weights: GroupWeights, sizes: Sequence[int]) -> Projections:
    """Keep the channels without which the loss would rise most, to second order: Σ w² E[(dL/dw)²] / 2.

    Optimal brain damage (LeCun et al. 1990) with the Fisher information for the Hessian (Theis et al. 2018,
    arXiv:1801.05787). The sum goes over all weights that write or read the channel, for all of them go with it.
    Raises UserError without pictures.
    """
    squares = gradients_of(weights, "fisher").squares
    axes = [*weights.writers, *weights.group.reads]
    return keep_largest(
        torch.stack([(weights.rows(a).square() * weights.rows(a, squares)).sum(1) for a in axes]).sum(0) / 2, sizes
    )


def gradients_of(weights: GroupWeights, method: str) -> Gradients:
    if weights.gradients is None:
        raise UserError(f"method {method!r} needs pictures (pictures=): {method}+synthetic or {method}+data")
    return weights.gradients


# Three ways for a channel to go: pruning drops it, folding merges it, and mix does either.
KINDS = ("fold", "prune", "mix")


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    choose: (weights, sizes, **options) -> {k: Projection}; kind: one of KINDS; gradients: whether it looks at
    gradients, and so needs pictures. activations: whether it looks at activations where there are pictures. The errors
    of one that does not are stated by weights alone, too, so that calibration leaves its report as it is.
    """

    choose: Callable[..., Projections]
    kind: str
    gradients: bool = False
    activations: bool = True

    def __call__(self, weights: GroupWeights, sizes: Sequence[int], **options: Any) -> Projections:
        return self.choose(weights, sizes, **options)


METHODS: dict[str, Method] = {
    "fold": Method(fold, "fold"),
    "mix": Method(mix, "mix"),
    "kmeans": Method(kmeans, "fold"),
    "special": Method(special, "fold"),
    "random_fold": Method(random_fold, "fold"),
    "l1": Method(partial(weight_norm, p=1), "prune", activations=False),
    "l2": Method(partial(weight_norm, p=2), "prune", activations=False),
    "obs": Method(brain_surgeon, "prune"),
    "wanda": Method(wanda, "prune"),
    "taylor": Method(taylor, "prune", gradients=True, activations=False),
    "fisher": Method(fisher, "prune", gradients=True, activations=False),
    "fpgm": Method(geometric_median, "prune", activations=False),
    "bn_scale": Method(norm_gain, "prune", activations=False),
    "random": Method(random, "prune", activations=False),
}
