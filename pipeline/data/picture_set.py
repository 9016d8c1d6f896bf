"""The records that every data source returns, and the checks that all sources share."""

import http.client
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.tables import UserError


class Pixels(Protocol):
    """N pictures of one size: a Tensor in memory, or `PictureFiles` that stay on disk."""

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, H)"""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The pictures of rows (B,) int64: (B, C, H, H) uint8"""


@dataclass(frozen=True)
class Portion:
    """The training or the test pictures of a set. images: (N, C, H, H) uint8, labels: (N,) int64

    varied: pictures for training in place of `images`, randomly cropped anew at every fetch; None: `images`
    """

    images: Pixels
    labels: Tensor
    varied: Pixels | None = None


@dataclass(frozen=True)
class PictureSet:
    """A data set in its two parts. train: None where there are test pictures alone

    mean, std: to normalise by, one per channel of pictures scaled to 0..1: those usual for the set, else those of its
        training pictures
    """

    train: Portion | None
    test: Portion
    classes: list[str]
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class DataSource:
    """A row of DATASETS: `load(**options)` reads the set from disk, `fetch(root)` downloads it where it is missing.

    root_names_data: does the root decide which pictures these are? Else it only says where well-known ones lie.
    kind: "pictures", or "text", whose `load` returns a Source of documents; decides which data module serves it
    """

    load: Callable[..., Any]
    fetch: Callable[..., None] | None = None
    root_names_data: bool = False
    kind: str = "pictures"


def picture_set(train: Portion, test: Portion, classes: list[str]) -> PictureSet:
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = [tuple(part.images.shape[1:]) for part in (train, test)]
        raise UserError(f"training pictures are {shapes[0]} (C, H, W) but test pictures are {shapes[1]}")
    return PictureSet(train, test, classes, *mean_std(train.images))


def part(where: str, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Portion:
    """Arrays (N, H, H, C) uint8 and (N,) integers as checked tensors; `where` names them in errors."""
    if images.dtype != np.uint8:
        raise UserError(f"{where}: pictures must be uint8 in 0..255, not {images.dtype}; convert them")
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] not in (1, 3):
        raise UserError(f"{where}: pictures must be (N, H, W, C), square, with C 1 or 3, not {images.shape}")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{where}: labels must be integers, not {labels.dtype}; convert them")
    if labels.shape != images.shape[:1] or not len(labels):
        raise UserError(f"{where}: {len(images)} pictures but labels of shape {labels.shape}; there must be one each")
    if labels.min() < 0 or labels.max() >= len(classes):
        span = f"{labels.min()}..{labels.max()}"
        raise UserError(f"{where}: labels {span} do not fit {len(classes)} classes; use 0..{len(classes) - 1}")
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return Portion(pixels, torch.from_numpy(labels.astype(np.int64)))


def mean_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of (N, C, H, W) uint8 scaled to 0..1.

    A histogram of 256 bins gives the exact result without a float copy of the whole set.
    """
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    weights = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ levels
    std = (weights * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    std[std == 0] = 1.0  # a constant channel normalises to zeros
    return mean.tolist(), std.tolist()


def download(name: str, make: Callable[[], object], archives: list[Path], otherwise: str) -> None:
    """Run torchvision's download `make`. UserError, with the files to put in place by hand, where it fails.

    archives: where torchvision stores what it downloads
    otherwise: what the user can do without a network
    """
    try:
        make()
    # torchvision raises RuntimeError for a wrong checksum and where all mirrors failed.
    except (OSError, http.client.HTTPException, tarfile.TarError, EOFError, zlib.error, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        halves = "".join(f"; delete {path} if its download was cut short" for path in archives if path.exists())
        raise UserError(f"cannot download {name} ({reason}): {otherwise}{halves}") from error
