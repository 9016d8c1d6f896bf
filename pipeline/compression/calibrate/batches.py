"""Calibration data in batches: read as often as needed, and never all at once."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.example import Example, call_arguments
from pipeline.tables import UserError

# Largest batch, so that memory is bounded: samples; values (13 pictures of 224 pixels); tokens, which are integers
# (samples, tokens) and become many values each.
SAMPLES, VALUES, TOKENS = 128, 2**21, 8192

CHANGED = (
    "pictures are not the same in every pass over them: give batches in a fixed order, without augmentation "
    "(shuffle=False)"
)


class Outline(NamedTuple):
    """The facts by which a batch is recognised in the next pass without being kept.

    samples: entries of its first dimension; shapes: those of one sample; total: the sum of all values, as text, so that
        NaN equals itself; tokens: whether all its tensors hold whole numbers
    """

    samples: int
    shapes: tuple[object, ...]
    total: str
    tokens: bool


class Batches:
    """Network inputs in batches of at most `largest` samples, the same in every pass over them.

    given: the caller's batches, each what the network is called with
    outlines: one for each batch; count: samples of all batches

    Raises UserError where there are no samples, and while iterating, where a pass differs from the first.
    """

    def __init__(self, given: Iterable[Example]) -> None:
        self.given = given
        self.outlines = tuple(map(outline, self._cuts()))
        self.count = sum(one.samples for one in self.outlines)
        if not self.count:
            raise UserError("pictures hold no samples: give at least one batch of network inputs")

    def __iter__(self) -> Iterator[Example]:
        for batch, expected in zip_longest(self._cuts(), self.outlines):
            # Passes must be alike: rows are drawn by their number, and two networks are compared batch by batch.
            if batch is None or outline(batch) != expected:
                raise UserError(CHANGED)
            yield batch

    def __len__(self) -> int:
        return len(self.outlines)

    @property
    def tokens(self) -> bool:
        """Are the inputs token ids, and no measured values?"""
        return self.outlines[0].tokens

    def _cuts(self) -> Iterator[Example]:
        for batch in self.given:
            count = samples(batch)
            size = largest(batch)
            for start in range(0, count, size):
                yield batch if count <= size else cut(batch, start, start + size)


def batches_of(pictures: Example | Iterable[Example]) -> Batches:
    """The Batches of a `pictures=` argument: one Example is one batch, anything else a collection of batches.

    Raises UserError for a collection that can be read only once, and for what is no network input.
    """
    if isinstance(pictures, Batches):
        return pictures
    if isinstance(pictures, (Tensor, tuple, dict)):
        return Batches([pictures])
    if not isinstance(pictures, Iterable):
        raise UserError(f"pictures must be network inputs or batches of them, got {type(pictures).__name__}")
    if iter(pictures) is pictures:
        kind = type(pictures).__name__
        raise UserError(f"pictures are looked at several times and a {kind} can be read once: give list(...) of it")
    return Batches(pictures)


def samples(batch: Example) -> int:
    """How many samples a batch holds: the first dimension of its first tensor. Raises UserError without a tensor."""
    if isinstance(batch, (Tensor, tuple, dict)):
        for leaf in tree_leaves(call_arguments(batch)):
            if isinstance(leaf, Tensor) and leaf.dim():
                return len(leaf)
    raise UserError(
        f"a batch of pictures is a {type(batch).__name__}: give what the network is called with, a tensor, a tuple of "
        "arguments or a dict of keyword arguments, with samples along the first dimension"
    )


def cut(batch: Example, start: int, stop: int) -> Example:
    """The samples from `start` to before `stop` of a batch: of all tensors that have one entry for each sample."""
    count = samples(batch)

    def taken(leaf: object) -> object:
        return leaf[start:stop] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count else leaf

    return tree_map(taken, dict(batch) if isinstance(batch, dict) else batch)


def largest(batch: Example) -> int:
    """How many samples a part of this batch may have: at least one, whatever its size."""
    leaves = [leaf for leaf in tree_leaves(call_arguments(batch)) if isinstance(leaf, Tensor) and leaf.dim()]
    limits = [SAMPLES]
    for leaf in leaves:
        tokens = leaf.dim() == 2 and not leaf.is_floating_point()
        limits.append((TOKENS if tokens else VALUES) // max(1, leaf[:1].numel()))
    return max(1, min(limits))


def outline(batch: Example) -> Outline:
    count, total, tokens = samples(batch), 0.0, True
    shapes: list[object] = []
    for leaf in tree_leaves(call_arguments(batch)):
        if not isinstance(leaf, Tensor):
            shapes.append(repr(leaf))
            continue
        shapes.append(tuple(leaf.shape[1:] if leaf.dim() and len(leaf) == count else leaf.shape))
        total += 0.0 if leaf.is_complex() else float(leaf.detach().sum(dtype=torch.float64))
        tokens = tokens and not (leaf.is_floating_point() or leaf.is_complex())
    return Outline(count, tuple(shapes), repr(total), tokens)
