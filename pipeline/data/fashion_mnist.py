"""Fashion-MNIST (arXiv:1708.07747): 60,000 + 10,000 pictures, 28x28, grey, as four idx files, plain or gzipped."""

import gzip
import math
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from pipeline.tables import UserError

from .picture_set import PictureSet, download, part, picture_set

STEMS = {"train": "train", "test": "t10k"}
FILES = [f"{stem}-{kind}-ubyte" for stem in STEMS.values() for kind in ("images-idx3", "labels-idx1")]


def load(root: str | Path = "data") -> PictureSet:
    """Fashion-MNIST from idx files in `root` or, as torchvision stores them, in `root`/FashionMNIST/raw."""
    root = Path(root).expanduser()
    paths = {name: find(root, name) for name in FILES}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise UserError(f"no Fashion-MNIST in {root}: put {', '.join(missing)} there, plain or as .gz")
    classes = list(FashionMNIST.classes)
    parts = []
    for stem in STEMS.values():
        images, labels = paths[f"{stem}-images-idx3-ubyte"], paths[f"{stem}-labels-idx1-ubyte"]
        parts.append(part(f"{images}, {labels.name}", read_idx(images, 3)[..., None], read_idx(labels, 1), classes))
    return picture_set(*parts, classes)


def fetch(root: str | Path = "data") -> None:
    """Download Fashion-MNIST into `root` unless its files are there."""
    root = Path(root).expanduser()
    if all(find(root, name) for name in FILES):
        return
    archives = [raw_folder(root) / f"{name}.gz" for name in FILES]
    otherwise = f"put {', '.join(FILES)} in {root}, plain or as .gz"
    download("Fashion-MNIST", partial(FashionMNIST, root, download=True), archives, otherwise)


def raw_folder(root: Path) -> Path:
    return root / "FashionMNIST" / "raw"


def find(root: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{end}" for folder in (root, raw_folder(root)) for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The array in an idx file: 0, 0, type (8 is uint8), number of axes, their lengths as big-endian uint32, the bytes.

    torchvision's reader is not used, because it takes no .gz and answers a cut file with an assertion or a wrong shape.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or half-downloaded ({error}); delete it and retry") from error
    start = 4 + 4 * dims
    if len(data) < start or data[:4] != bytes([0, 0, 8, dims]):
        raise UserError(f"{path} is no idx file of bytes with {dims} axes; delete it and retry")
    shape = struct.unpack(f">{dims}I", data[4:start])
    if len(data) != start + math.prod(shape):
        expected = start + math.prod(shape)
        raise UserError(f"{path} has {len(data)} bytes where its header asks for {expected}; delete it and retry")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
