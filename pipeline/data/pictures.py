"""A set of pictures, in memory or on disk, served in normalised batches."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2.functional import normalize, to_dtype

from .augment import PerPicture, each
from .picture_set import Pixels


def collate(batch: Any) -> Any:
    """Pass on a batch that `__getitems__` made; stack single samples, as wrappers without `__getitems__` give them."""
    return default_collate(batch) if isinstance(batch, list) else batch


class Pictures(Dataset):
    """Pictures as bytes; augmented, scaled and normalised when a batch is fetched.

    images: (N, C, H, W) uint8, a Tensor or other Pixels
    labels: (N,) int64
    mean, std: (C,) of the pictures scaled to 0..1
    augment: a transform of uint8 pictures, drawn anew for every picture of a batch; v2 transforms of one picture are
        called picture by picture, `PerPicture` ones once per batch
    rows: (n,) int64; serve only these of the N pictures, without copying pixels

    A DataLoader needs `collate_fn=Pictures.collate`, since batches are fetched whole.
    """

    collate = staticmethod(collate)

    def __init__(
        self,
        images: Pixels,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Callable[[Tensor], Tensor] | None = None,
        rows: Tensor | None = None,
    ):
        self.mean, self.std = list(mean), list(std)
        if augment is not None and not isinstance(augment, PerPicture):
            augment = PerPicture([partial(each, transform=augment)])
        self.augment = augment
        self.rows = torch.arange(len(labels)) if rows is None else rows
        self._images, self._labels = images, labels

    @property
    def in_memory(self) -> bool:
        """Are batches cut from a tensor, so that worker processes would only cost time?"""
        return isinstance(self._images, Tensor)

    @property
    def images(self) -> Tensor:
        """(n, C, H, W) uint8, a copy, neither augmented nor normalised."""
        return self._images[self.rows]

    @property
    def labels(self) -> Tensor:
        """(n,) int64"""
        return self._labels[self.rows]

    def subset(self, indices: Tensor | Sequence[int], augment: Callable[[Tensor], Tensor] | None = None) -> "Pictures":
        """The pictures at `indices`, over the same pixels, with `augment` in place of this set's augmentation."""
        rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)]
        return Pictures(self._images, self._labels, self.mean, self.std, augment, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A normalised picture (C, H, W) float32 and its label."""
        pictures, labels = self.__getitems__([index])
        return pictures[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once, (B, C, H, W) float32 and (B,) int64: DataLoader prefers this to B single fetches."""
        rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)]
        pictures = self._images[rows]
        if self.augment is not None:
            pictures = self.augment(pictures)
        scaled = to_dtype(pictures, torch.float32, scale=True)
        return normalize(scaled, self.mean, self.std, inplace=True), self._labels[rows]
