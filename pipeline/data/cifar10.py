"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 pictures, 32x32 RGB, in any of three common forms."""

import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from pipeline.tables import UserError

from . import folder
from .picture_set import PictureSet, download, part, picture_set

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ARRAYS = ["x_train", "y_train", "x_test", "y_test"]


def load(root: str | Path = "data") -> PictureSet:
    """CIFAR-10 from `root`, which holds cifar10.npz, cifar-10-batches-py/ or train/ and test/, or is an .npz itself.

    The npz has x_train, x_test (N, 32, 32, 3) uint8 and y_train, y_test (N,) integers.
    """
    root = Path(root).expanduser()
    if npz_path(root).is_file():
        return load_npz(npz_path(root))
    if (root / CIFAR10.base_folder).is_dir():
        return load_pickles(root)
    if (root / "train").is_dir():
        return load_folder(root)
    raise UserError(f"no CIFAR-10 in {root}: put cifar10.npz, {CIFAR10.base_folder}/ or train/ and test/ there")


def fetch(root: str | Path = "data") -> None:
    """Download CIFAR-10 into `root` unless one of the three forms is there."""
    root = Path(root).expanduser()
    if root.suffix == ".npz" or npz_path(root).is_file() or (root / "train").is_dir() or not damaged(root):
        return
    make = partial(torchvision_part, root, train=True, download=True)
    download("CIFAR-10", make, [root / CIFAR10.filename], f"put {CIFAR10.filename} or cifar10.npz in {root}")


def npz_path(root: Path) -> Path:
    return root if root.suffix == ".npz" else root / "cifar10.npz"


def load_npz(path: Path) -> PictureSet:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file]
            arrays = {name: file[name] for name in ARRAYS if name in file}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or half-copied ({error}); delete it and copy it again") from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it must hold {', '.join(ARRAYS)}")
    parts = (
        part(f"{path} {name}", arrays[f"x_{name}"], arrays[f"y_{name}"].reshape(-1), CLASSES)
        for name in ("train", "test")
    )
    return picture_set(*parts, CLASSES)


def load_pickles(root: Path) -> PictureSet:
    try:
        train, test = (torchvision_part(root, train=train) for train in (True, False))
    except RuntimeError as error:
        raise UserError(
            f"missing or damaged: {', '.join(map(str, damaged(root)))}; delete {root / CIFAR10.base_folder} and"
            f" unpack {CIFAR10.filename} again, or let download=True fetch it"
        ) from error
    parts = (part(str(root / CIFAR10.base_folder), s.data, np.array(s.targets), CLASSES) for s in (train, test))
    return picture_set(*parts, CLASSES)


def torchvision_part(root: Path, train: bool, download: bool = False) -> CIFAR10:
    with warnings.catch_warnings():
        # the pickles of 2009 store a flag of numpy's dtypes as an integer, which NumPy 2.4 deprecates
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        return CIFAR10(root, train=train, download=download)


def damaged(root: Path) -> list[Path]:
    """The files of torchvision's layout that are missing or have the wrong checksum."""
    sums = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    paths = [(root / CIFAR10.base_folder / name, md5) for name, md5 in sums]
    return [path for path, md5 in paths if not check_integrity(path, md5)]


def load_folder(root: Path) -> PictureSet:
    pictures = folder.load(root)
    if pictures.classes != CLASSES:
        raise UserError(
            f"{root / 'train'} is not CIFAR-10 (classes {', '.join(pictures.classes)}); use data set 'folder'"
        )
    return pictures
