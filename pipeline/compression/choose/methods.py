"""METHODS: how a channel group is made smaller. A method is a function of the group's tensors that returns labels.

    method(weights, sizes, **options) -> {k: Projection} for every size k in `sizes`

All sizes come in one call, so that what they share is computed once. Adding a method is one function here and one row
in METHODS.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from pipeline.compression.choose.cluster import (
    LARGE,
    fold_labels,
    greedy_order,
    mixed_labels,
    special_folding,
    surgeon_order,
)
from pipeline.compression.choose.gradients import Gradients
from pipeline.compression.group import Axis, ChannelGroup
from pipeline.compression.merge.projection import Projection, reconstruction_error
from pipeline.compression.products import gram_matrix
from pipeline.tables import UserError, pick

FEATURES = ("writers", "readers", "writers+readers")
SCALES = ("none", "tensor", "channel")
TINY = 1e-30


@dataclass(frozen=True)
class GroupWeights:
    """The input of a method: one group and the tensors of the checkpoint.

    features: which weights describe a channel: "writers", "readers" or "writers+readers"
    scale: "none", "tensor" (every weight tensor counts the same) or "channel" (every channel has norm 1: angles alone)
    norm: put the scale and shift of the norm behind a weight, and biases, into the description
    inputs: {weight: (rows, inputs)}, the inputs of its layer on some pictures (see compensate.observe)
    moments: gives {weight: (inputs, inputs)} in their place (see compensate.second_moments)
    gradients: those of the network on these pictures, for the methods that look at them
    seed: for methods that draw at random

    Measured on a CIFAR-10 ResNet-20 and a narrow ResNet18 (docs/features.md): writers and readers together lead, the
    norm is better left out, and scale "none" and "tensor" tie; "tensor" leads once repaired.
    """

    group: ChannelGroup
    tensors: Mapping[str, Tensor]
    features: str = "writers+readers"
    scale: str = "tensor"
    norm: bool = False
    seed: int = 0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Gradients | None = None
    moments: Callable[[], Mapping[str, Tensor]] = dict

    def __post_init__(self) -> None:
        pick("features", dict.fromkeys(FEATURES), self.features)
        pick("scale", dict.fromkeys(SCALES), self.scale)

    @property
    def dtype(self) -> torch.dtype:
        """float64; float32 for large groups of weights below float64, as double precision would take seconds."""
        double = any(self.tensors[a.tensor].dtype == torch.float64 for a in (*self.group.writes, *self.group.reads))
        return torch.float64 if double or self.group.size <= LARGE else torch.float32

    def rows(self, axis: Axis, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The entries of each channel along an axis, (C, F) of self.dtype; tensors: others of the same shapes."""
        tensor = (self.tensors if tensors is None else tensors)[axis.tensor]
        places = axis.index.reshape(-1).to(tensor.device)
        if not torch.equal(places, torch.arange(tensor.shape[axis.axis], device=tensor.device)):
            tensor = tensor.index_select(axis.axis, places)
        # At most one copy is made: these are all weights of the network, and Gram matrices are half of a clustering.
        rows = tensor.movedim(axis.axis, 0).to(self.dtype, memory_format=torch.contiguous_format)
        return rows.reshape(len(axis.index), -1)

    @property
    def writers(self) -> list[Axis]:
        """The weights that write the group, in the network's order: no biases, no norm parameters."""
        weights = [a for a in self.group.writes if self.tensors[a.tensor].dim() > 1]
        return weights or [a for a in self.group.writes][:1]

    def blocks(self) -> Iterator[Tensor]:
        """The feature rows of the channels, one (C, F) block per weight tensor, each made when it is asked for."""
        if "writers" in self.features:
            yield from map(self._written, self.writers)
        if "readers" in self.features:
            yield from (self.rows(a) for a in self.group.reads if self.tensors[a.tensor].dim() > 1)

    def _written(self, axis: Axis) -> Tensor:
        """The rows of a writer; with `norm`, those of the affine map of the weight, its bias and its norm together."""
        rows = self.rows(axis)
        if not self.norm:
            return rows
        axes = {a.tensor: a for a in self.group.writes}
        norm = next((n for n in self.group.norms if n.writer == axis.tensor), None)
        own_bias = axis.tensor.removesuffix("weight") + "bias"
        bias = self.rows(axes[own_bias]) if own_bias in axes and own_bias != axis.tensor else None
        if norm is not None:
            gain, shift, center, var = (
                self.rows(axes[n]) if n in axes else default
                for n, default in ((norm.weight, 1.0), (norm.bias, 0.0), (norm.mean, 0.0), (norm.var, 1.0))
            )
            s = gain / (torch.as_tensor(var, dtype=rows.dtype) + norm.eps).sqrt().to(rows)
            bias = (0.0 if bias is None else s * bias) + shift - center * s
            rows = rows * s
        if isinstance(bias, Tensor) and bias.shape == (len(rows), 1):
            rows = torch.cat([rows, bias], 1)
        return rows

    @cached_property
    def gram(self) -> Tensor:
        """Gram matrix of the features, (C, C) of self.dtype on the CPU, multiplied where the network is.

        For gated channels it is that of what they compute, each weighted by the norm of its readers: H_ij |v_i| |v_j|.
        Channels that are written alike have one row, the mean of theirs, because they merge without loss whatever reads
        them.
        """
        if self.group.gated:
            size = self.contributions.diagonal().clamp(min=0).sqrt()
            return self.computed * size[:, None] * size
        total = torch.zeros(self.group.size, self.group.size, dtype=self.dtype)
        # `map` holds no block while the next one is made, which so finds the memory of the last.
        for found in map(_product, self.blocks()):
            own = found.to("cpu", self.dtype)
            if self.scale == "tensor" and own.trace() > 0:
                own /= float(own.trace())
            total += own
        if self.scale == "channel":
            norms = total.diagonal().clamp(min=torch.finfo(self.dtype).tiny).sqrt()
            total = total / norms[:, None] / norms
        alike = self.written_alike()
        return total if len(alike.unique()) == len(alike) else averaged(total, alike)

    def written_alike(self) -> Tensor:
        """(C,) int64: for each channel the first one that every tensor of the group writes with the same values."""
        first = torch.arange(self.group.size)
        # One entry of each tensor tells most channels apart, so that few rows are read and compared in full.
        for near in equal_rows(torch.stack([self._entry(axis) for axis in self.group.writes], 1)):
            axes = [replace(axis, index=axis.index[near]) for axis in self.group.writes]
            for same in equal_rows(torch.cat([self.rows(axis).cpu() for axis in axes], 1)):
                first[near[same]] = near[same[0]]
        return first

    def _entry(self, axis: Axis) -> Tensor:
        """One entry of each channel along an axis, (C,) of self.dtype on the CPU."""
        tensor = self.tensors[axis.tensor]
        line = tensor.movedim(axis.axis, -1)[(0,) * (tensor.dim() - 1)]
        return line[axis.index[:, 0].to(line.device)].to("cpu", self.dtype)

    @cached_property
    def activations(self) -> Tensor | None:
        """Second moments of the channels' activations, (C, C), of trace 1; None where none were seen.

        The mean over the layers that read the channels, each counting the same.
        """
        found, moments_of = [], self.moments()
        for axis in self.group.reads:
            if axis.query or not (axis.tensor in self.inputs or axis.tensor in moments_of):
                continue
            # Where a channel is m inputs, each of them is one more row.
            if axis.tensor in self.inputs:
                seen = self.inputs[axis.tensor]
                rows = seen[:, axis.index.to(seen.device)].transpose(1, 2).flatten(0, 1)
                moments = rows.T @ rows
            else:
                every = moments_of[axis.tensor]
                moments = torch.stack([every[places][:, places] for places in axis.index.T.to(every.device)]).sum(0)
            moments = moments.to("cpu", self.dtype)
            found.append(moments / moments.trace().clamp(min=torch.finfo(torch.float32).tiny))
        return torch.stack(found).mean(0) if found else None

    @cached_property
    def computed(self) -> Tensor:
        """H (C, C): second moments of what gated channels compute, up to a factor: on pictures, else by their weights.

        For inputs x that are white and Gaussian, products (g x)(u x) have the moments of Isserlis' theorem,
        (g_i g_j)(u_i u_j) + (g_i u_j)(u_i g_j) + (g_i u_i)(g_j u_j): the second order of a smooth gate.
        """
        if self.activations is not None:
            return self.activations
        rows = [self.rows(axis) for axis in self.writers]
        if len(rows) != 2 or rows[0].shape != rows[1].shape:
            return torch.stack([gram_matrix(r) for r in rows]).prod(0).cpu()
        gate, up = rows
        crossed, own = gate @ up.T, (gate * up).sum(1)
        return (gram_matrix(gate) * gram_matrix(up) + crossed * crossed.T + own[:, None] * own).cpu()

    @cached_property
    def similarity(self) -> Tensor:
        """The matrix that folding clusters by, (C, C): the Gram matrix, plus activations of equal trace if known."""
        if self.activations is None or not self.gram.trace() > 0:
            return self.gram
        return self.gram / self.gram.trace() + self.activations

    @cached_property
    def contributions(self) -> Tensor:
        """Vᵀ V (C, C) of all weights V (outputs, C) that read the channels."""
        rows = [self.rows(axis) for axis in self.group.reads if self.tensors[axis.tensor].dim() > 1]
        products = (gram_matrix(r).cpu() for r in rows)
        return sum(products, torch.zeros(self.group.size, self.group.size, dtype=self.dtype))

    def error(self, projection: Projection) -> float:
        """Relative parameter error of the projection in these features; by `shown` where representatives are chosen."""
        if projection.chosen is None:
            return reconstruction_error(self.gram, projection)
        total = float(self.gram.diagonal().double().sum())
        members = (projection.labels >= 0).nonzero().squeeze(1)
        kept = float(self.shown[members, projection.into[members]].double().sum())
        return (max(total - kept, 0.0) / total) ** 0.5 if total > 0 else 0.0

    @cached_property
    def shown(self) -> Tensor:
        """(C, C): how much of channel i's energy channel r shows, G_ir² / G_rr in the Gram matrix G; all of its own."""
        return self.gram.square() / self.gram.diagonal().clamp(min=TINY)

    @cached_property
    def by_greed(self) -> Tensor:
        """(C,) int64: gated channels in the order in which they become representatives of all others."""
        return torch.from_numpy(greedy_order(self.shown.numpy()))

    def represented(self, chosen: Tensor) -> Projection:
        """The folding of gated channels onto those chosen, (k,) int64, each onto the one that shows most of it.

        No gated channel computes the mean of several. The best one can do is a multiple of one of them, H_ir / H_rr
        times the representative r, which readers take, so that what is lost of channel i is H_ii - H_ir² / H_rr.
        """
        labels = self.shown[:, chosen].argmax(1)
        labels[chosen] = torch.arange(len(chosen))
        stands, energy = chosen[labels], self.computed.diagonal().clamp(min=TINY)
        return Projection(labels, chosen, self.computed[torch.arange(len(labels)), stands] / energy[stands])


def _product(rows: Tensor) -> Tensor:
    """The Gram matrix of (C, F). A GPU may round products of float32 to a few digits, so it gets float64."""
    return gram_matrix(rows.double() if rows.is_cuda else rows)


def equal_rows(rows: Tensor) -> list[Tensor]:
    """The places of equal rows of (n, F), ascending, a list of int64 tensors; rows that equal no other are in none."""
    _, labels, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    return [(labels == j).nonzero().squeeze(1) for j in (counts > 1).nonzero().squeeze(1)]


def averaged(gram: Tensor, classes: Tensor) -> Tensor:
    """The Gram matrix (C, C) of features in which all rows of a class, (C,) int64, are the mean of its rows."""
    _, labels = classes.unique(return_inverse=True)
    members = torch.nn.functional.one_hot(labels).to(gram)
    mean = members / members.sum(0)
    return members @ (mean.T @ gram @ mean) @ members.T


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
