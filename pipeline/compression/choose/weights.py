"""GroupWeights: what a method knows about a channel group, computed when it is first asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pipeline.compression.choose.cluster import LARGE, greedy_order
from pipeline.compression.choose.gradients import Gradients
from pipeline.compression.group import Axis, ChannelGroup
from pipeline.compression.merge.projection import Projection, reconstruction_error
from pipeline.compression.products import gram_matrix, gram_total
from pipeline.tables import pick

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
        # A matrix needs none, because products take its transpose as it is.
        layout = torch.contiguous_format if tensor.dim() > 2 else torch.preserve_format
        rows = tensor.movedim(axis.axis, 0).to(self.dtype, memory_format=layout)
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
        total = gram_total(self.blocks(), self.group.size, self.dtype, even=self.scale == "tensor")
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
        rows = (self.rows(axis) for axis in self.group.reads if self.tensors[axis.tensor].dim() > 1)
        return gram_total(rows, self.group.size, self.dtype)

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
