"""Channel groups: which entries of which tensors belong to one channel."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Where the channels of a group stand along one axis of one tensor.

    index: (C, m) int64; channel c holds the m positions index[c]. m > 1 where a channel is several rows or columns
    (after a flatten: one per pixel; a whole attention head); the j-th position of every channel means the same thing.
    query: whether the entries make the queries of an attention head, which read its keys.
    """

    tensor: str
    axis: int
    index: Tensor = field(repr=False, compare=False)
    query: bool = False

    @cached_property
    def is_plain(self) -> bool:
        """Is channel c the entry c, and no other?"""
        return self.index.shape[1] == 1 and bool((self.index[:, 0] == torch.arange(len(self.index))).all())


@dataclass(frozen=True)
class Norm:
    """A per-channel normalisation y = weight * (x - mean) / sqrt(var + eps) + bias, by the names of its tensors.

    writer, writer_bias: the weight (and bias) whose output this norm, and nothing else, reads; None where the norm
    reads a sum or where others read the same output, so that its scale cannot be moved into the weight.
    """

    weight: str | None
    bias: str | None
    mean: str | None
    var: str | None
    eps: float
    writer: str | None = None
    writer_bias: str | None = None


# Kinds of channels. hidden: between two layers; residual: in a stream that blocks add to; width: one of the products
# that the score of an attention head sums up, or one of its values; head: a whole attention head.
PARTS = ("hidden", "residual", "width", "head")
# The study compresses these: all of a convolutional network, the MLPs of a transformer.
DEFAULT_PARTS = ("hidden", "residual")


@dataclass(frozen=True)
class Number:
    """A size that a module keeps as a Python number: with k of C channels left it becomes value * (k / C) ** power."""

    path: str
    power: float = 1.0


@dataclass(frozen=True)
class ChannelGroup:
    """One set of `size` interchangeable channels with everything that writes and reads them.

    writes: rows of weights, biases, norm parameters and statistics, in the order of the network.
    reads: columns of the weights that take these channels as input. In the width of an attention head, keys write the
        channels and queries read them: their score is the sum over channels of the products of the two.
    norms: the normalisations among the writes.
    part: one of PARTS
    temperature: with k of C channels left, queries are multiplied by (k / C) ** temperature: 0.5 where attention
        divides scores by the square root of the width that it finds, 0 where it divides by a constant
    tie: groups of one tie must keep the same number of channels (the heads of one layer)
    numbers: sizes that modules keep as Python numbers, which change with the size of the group
    cut_by: operations that tell these channels from others of the same tensors: chunk, attention
    gated: whether a channel is the product of two others (SwiGLU), so that the mean of the factors of several channels
        is not the mean of what they compute
    """

    name: str
    size: int
    writes: tuple[Axis, ...]
    reads: tuple[Axis, ...]
    norms: tuple[Norm, ...] = ()
    part: str = "hidden"
    temperature: float = 0.0
    tie: str = ""
    numbers: tuple[Number, ...] = ()
    cut_by: tuple[str, ...] = ()
    gated: bool = False


@dataclass(frozen=True)
class Frozen:
    """Channels that stay as they are: how many, of which tensors, and why."""

    size: int
    tensors: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
        return f"{self.size} channels of {', '.join(self.tensors[:3])}{more}: {self.reason}"


@dataclass(frozen=True)
class ChannelGroups:
    """The groups of a network, in its order, and its frozen channels. Iterates over the groups."""

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...] = ()

    @property
    def ties(self) -> list[list[int]]:
        """Lists of the places of groups that must keep equal sizes; every group is in one of the lists."""
        found: dict[str, list[int]] = {}
        for i, group in enumerate(self.groups):
            found.setdefault(group.tie or group.name, []).append(i)
        return list(found.values())

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> ChannelGroup:
        return self.groups[i]
