"""Pictures that stay on disk: decoded when they are asked for, with a cache of decoded ones."""

import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.tables import UserError, first_line

from .folder import read_picture


class DecodedCache:
    """Decoded pictures in one file: the picture of row r lies at byte r * `record`, with its CRC-32 behind it.

    Any number of processes read and write it at once without a lock. A record that was never written, was cut off by a
    crash or a full disk, or is just being written by another process fails its check; its picture is then decoded and
    written anew. The file is sparse: it takes only the room of the records that were written.

    shape: (C, H, W) of a picture
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self.path, self.bytes, self.full = path, prod(shape), False
        # A record is whole pages of 4 KiB, because machines that share a file over a network write whole pages.
        self.record = -(-(self.bytes + 4) // 4096) * 4096
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise UserError(
                f"cache {path} cannot be written ({error.strerror}); give another folder with data.cache=..., or null"
            ) from error

    def read(self, rows: Sequence[int], pictures: Tensor) -> list[int]:
        """Fill `pictures: (B, C, H, W) uint8` with those of `rows`; returns the places in it that the cache lacks."""
        missing = []
        try:
            with self.path.open("rb", buffering=0) as file:
                for place, row in enumerate(rows):
                    file.seek(row * self.record)
                    pixels = pictures[place].numpy()
                    if file.readinto(pixels) != self.bytes or file.read(4) != crc32(pixels):
                        missing.append(place)
        except OSError:  # the file was deleted
            return list(range(len(rows)))
        return missing

    def write(self, rows: Sequence[int], pictures: Tensor, places: Iterable[int]) -> None:
        """Store the pictures at `places` of `pictures`, which are those of `rows`. A full disk ends all storing."""
        try:
            with self.path.open("r+b", buffering=0) as file:
                for place in places:
                    file.seek(rows[place] * self.record)
                    pixels = pictures[place].numpy()
                    file.write(pixels.tobytes() + crc32(pixels))
        except OSError as error:
            self.full = True
            warnings.warn(
                f"cache {self.path} cannot be written ({first_line(error)}); more pictures are decoded at every use",
                RuntimeWarning,
                stacklevel=2,
            )


def crc32(pixels: np.ndarray) -> bytes:
    return zlib.crc32(pixels).to_bytes(4, "little")


class PictureFiles:
    """Pixels that are decoded when they are fetched: `files[rows]`, rows (B,) int64, gives (B, 3, size, size) uint8.

    folder: holds the files; names: (N,) bytes, their paths in it. An array, because worker processes share it; counting
        references would copy a list of a million strings page by page
    transform: from an RGB picture of PIL to a (3, size, size) uint8 tensor
    cache: keeps decoded pictures, None: nothing does. A transform that draws at random must have none
    """

    def __init__(
        self,
        folder: Path,
        names: np.ndarray,
        size: int,
        transform: Callable[[Image.Image], Tensor],
        cache: DecodedCache | None = None,
    ) -> None:
        self.folder, self.names, self.size, self.transform, self.cache = folder, names, size, transform, cache

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.names), 3, self.size, self.size))

    def __getitem__(self, rows: Tensor) -> Tensor:
        wanted = rows.tolist()
        pictures = torch.empty(len(wanted), *self.shape[1:], dtype=torch.uint8)
        missing = list(range(len(wanted))) if self.cache is None else self.cache.read(wanted, pictures)
        for place in missing:
            path = os.path.join(self.folder, os.fsdecode(self.names[wanted[place]]))
            pictures[place] = self.transform(read_picture(path, "RGB"))
        if missing and self.cache is not None and not self.cache.full:
            self.cache.write(wanted, pictures, missing)
        return pictures
