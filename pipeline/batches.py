"""Batches for several passes, one sample for a trace, the choice of calibration samples: for batches of any kind."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

KEPT = 2**31  # bytes of the machine's memory that batches may take


def sample(size: int, count: int, seed: int, batch_size: int = 256) -> list[int]:
    """Indices of about `count` of `size` training samples to repair with, in whole batches, which count alike."""
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    batch_size = min(batch_size, len(drawn))
    return drawn[: len(drawn) // batch_size * batch_size].tolist() if batch_size else []


def tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch, whatever holds them."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def samples(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor that has a dimension."""
    return next((len(tensor) for tensor in tensors(batch) if tensor.dim()), 1)


def first_sample(inputs: Any) -> Any:
    """A batch of one: the first sample of every tensor that is as long as the batch, copied to let the batch go."""
    size = samples(inputs)

    def cut(leaf: Any) -> Any:
        of_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
        return leaf[:1].clone() if of_batch else leaf

    return tree_map(cut, inputs)


def room(device: torch.device) -> int:
    """Bytes that batches may take on the device: half of a GPU's free memory, for a network needs the rest."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else KEPT


class Passes:
    """Batches for any number of passes: kept on their device if they fit there, else fetched anew at each pass.

    The first pass finds out whether they fit, so loaders need no length: ImageNet's 50,000 test pictures are 30 GB.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self._kept: list[Any] | None = None
        self._streams = False

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            return iter(self._kept)
        return iter(self.batches) if self._streams else self._first()

    def _first(self) -> Iterator[Any]:
        kept: list[Any] = []
        left: int | None = None
        for batch in self.batches:
            if not self._streams:
                found = tensors(batch)
                left = room(found[0].device if found else torch.device("cpu")) if left is None else left
                left -= sum(tensor.numel() * tensor.element_size() for tensor in found)
                kept.append(batch)
                if left < 0:
                    self._streams, kept = True, []
            yield batch
        if not self._streams:
            self._kept = kept
