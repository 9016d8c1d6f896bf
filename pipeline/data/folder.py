"""Any folder of pictures: train/<class>/*, test/<class>/* (or val/ for test/)."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import is_image_file, make_dataset
from torchvision.transforms.v2.functional import center_crop, resize

from pipeline.tables import UserError, first_line

from .picture_set import PictureSet, part, picture_set


class UnreadablePicture(UserError):
    """A file that is no picture, or a damaged one.

    A DataLoader raises a worker's error again with the worker's whole traceback as its message; this class keeps only
    the last line, which is the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__qualname__}: "))


def load(root: str | Path | None = None, size: int | None = None) -> PictureSet:
    """The pictures under `root`, classes in the order of their names; grey if all are, else RGB.

    size: side in pixels: the shorter side of a picture is resized to it and the centre is cropped; None leaves pictures
        as they are, and then all must be squares of one size
    """
    if root is None:
        raise UserError("data set 'folder' needs root, the folder that holds train/<class>/* and test/<class>/*")
    if size is not None and size < 1:
        raise UserError(f"size {size} must be at least 1 pixel")
    root = Path(root).expanduser()
    folders = [part_folder(root, "train"), part_folder(root, "test", "val")]
    classes = class_names(*folders)

    files = [list_files(folder, classes) for folder in folders]
    # Both parts are read into one array, because a single colour picture makes all of them RGB.
    paths, labels = zip(*files[0], *files[1], strict=True)
    images = stack(decode_all(paths, size), paths)
    cut = slice(None, len(files[0])), slice(len(files[0]), None)
    parts = [part(str(f), images[rows], np.array(labels[rows]), classes) for f, rows in zip(folders, cut, strict=True)]
    return picture_set(*parts, classes)


def part_folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"no folder {' or '.join(str(root / name) for name in names)}; put pictures in {names[0]}/<class>/")


def class_names(*folders: Path) -> list[str]:
    """The classes that all of the folders have, in the order of their names."""
    found = []
    for folder in folders:
        # torchvision's find_classes would take .git or .ipynb_checkpoints for a class.
        found.append(sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith(".")))
        if not found[-1]:
            raise UserError(f"{folder} has no class folders; put pictures in {folder}/<class>/")
    odd = sorted(set(found[0]) ^ set(found[-1]))
    if odd:
        both, few = " and ".join(map(str, folders)), ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        raise UserError(f"{both} must have the same classes; only one of them has: {few}")
    return found[0]


def list_files(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """(path, label) of every picture file, by class and then by name."""
    labels = {name: label for label, name in enumerate(classes)}
    files = make_dataset(folder, labels, is_valid_file=is_picture, allow_empty=True)
    filled = {label for _, label in files}
    for name, label in labels.items():
        if label not in filled:
            raise UserError(f"class folder {folder / name} has no pictures; add some or delete the folder")
    return files


def is_picture(path: str) -> bool:
    return is_image_file(path) and not os.path.basename(path).startswith(".")  # macOS leaves ._name.png beside name.png


def decode_all(paths: Sequence[str], size: int | None) -> list[np.ndarray]:
    if size is None:
        # Decoding a 32x32 PNG takes 0.1 ms, most of it in Python: two threads are slower than one (60,000 in 12 s
        # against 7 s). Seven seconds need no cache on disk.
        return [decode(path, size) for path in paths]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # large pictures: PIL decodes and resizes outside the GIL
        return list(pool.map(partial(decode, size=size), paths))


def decode(path: str, size: int | None) -> np.ndarray:
    """One picture as (H, W) grey or (H, W, 3) RGB uint8."""
    picture = read_picture(path)
    return np.array(picture if size is None else center_crop(resize(picture, [size]), [size, size]))


def read_picture(path: str, mode: str | None = None) -> Image.Image:
    """One picture in PIL's `mode`; None: grey ones as "L" and all others as "RGB"."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):  # PIL would clip these to 255
                raise ValueError(f"mode {file.mode}, more than 8 bits per channel")
            return file.convert(mode or ("L" if file.mode in ("1", "L", "LA") else "RGB"))
    # PIL reports damaged files as any of these
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadablePicture(f"cannot read picture {path} ({first_line(error)}); replace or delete it") from error


def stack(images: list[np.ndarray], paths: Sequence[str]) -> np.ndarray:
    """The pictures as one (N, H, W, C) array. Grey and RGB may mix; UserError where sizes differ."""
    for image, path in zip(images, paths, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            sizes = " but ".join(f"{p} is {i.shape[1]}x{i.shape[0]}" for i, p in ((images[0], paths[0]), (image, path)))
            raise UserError(f"pictures differ in size: {sizes}; set size, such as size=64, to resize them")
    if all(image.ndim == 2 for image in images):
        return np.stack(images)[..., None]
    return np.stack([image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images])
