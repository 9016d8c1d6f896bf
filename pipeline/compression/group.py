"""The words of the engine: which entries of which tensors belong to one channel."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Where the channels of a group stand along one axis of one tensor.

    index: (C, m) int64; channel c holds the m positions index[c]. m > 1 where a channel is several rows or columns
    (after a flatten: one per pixel); the j-th position of every channel means the same thing.
    """

    tensor: str
    axis: int
    index: Tensor = field(repr=False, compare=False)


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


@dataclass(frozen=True)
class ChannelGroup:
    """One set of `size` interchangeable channels with everything that writes and reads them.

    writes: rows of weights, biases, norm parameters and statistics, in the order of the network.
    reads: columns of the weights that take these channels as input.
    norms: the normalisations among the writes.
    """

    name: str
    size: int
    writes: tuple[Axis, ...]
    reads: tuple[Axis, ...]
    norms: tuple[Norm, ...] = ()


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
    """The groups of a network, in its order, and what is frozen. Iterates over the groups."""

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...] = ()

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> ChannelGroup:
        return self.groups[i]
