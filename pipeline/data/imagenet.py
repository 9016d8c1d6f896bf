"""ImageNet-1K (arXiv:1409.0575), or any large set of pictures as train/<class>/*, val/<class>/*, kept on disk.

The layout is that of the unpacked archives, and of `torchvision.datasets.ImageNet`. Classes are in the order of their
folders' names, which for the 1000 WordNet ids (n01440764, ...) is the usual numbering.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from pipeline.tables import UserError, pick

from .folder import class_names, list_files, part_folder
from .on_disk import DecodedCache, PictureFiles
from .picture_set import PictureSet, Portion

# PIL has no nearest-exact.
INTERPOLATIONS = {mode.value: mode for mode in InterpolationMode if mode is not InterpolationMode.NEAREST_EXACT}


def load(
    root: str | Path | None = None,
    preprocessing: str | None = None,
    size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    scale: Sequence[float] = (0.08, 1.0),
    cache: str | Path | None = None,
) -> PictureSet:
    """The pictures under `root`, RGB; train/ may be missing, and val/ be called test/.

    Training sees a random crop (arXiv:1409.4842), everything else the centre crop of timm's evaluation.
    preprocessing: a timm model for which pictures are prepared: its size, crop_pct, interpolation, mean and std, each
        of which can be set on its own as well; None: 224 pixels, 0.875, bicubic, ImageNet's mean and std
    size: side in pixels of what the network sees
    crop_pct: which share of the shorter side the centre crop keeps, 0 < crop_pct <= 1
    scale: least and greatest share of a picture's area that a random crop keeps
    cache: folder for decoded centre crops, each of 3 * size * size bytes and decoded once for all runs (7.6 GB for
        ImageNet's 50,000 at 224 pixels). It can be deleted at any time, and must be where a picture was replaced
        under its old name. None: decode at every use
    """
    if root is None:
        raise UserError("data set 'imagenet' needs root, the folder that holds train/<class>/* and val/<class>/*")
    from timm.data import create_transform  # takes seconds, and most runs do not need it

    config = data_config(preprocessing, size, crop_pct, interpolation)
    root, size = Path(root).expanduser(), config["input_size"][-1]
    centre = create_transform(**config, normalize=False)
    random = random_crop(size, scale, INTERPOLATIONS[config["interpolation"]])

    folders = [part_folder(root, "val", "test")]
    if (root / "train").is_dir():
        folders.append(root / "train")
    classes = class_names(*folders)
    parts = []
    for folder in folders:
        names, labels = listing(folder, classes)
        kept = None
        if cache is not None:
            kept = DecodedCache(cache_file(Path(cache).expanduser(), folder, names, config), (3, size, size))
        whole = PictureFiles(folder, names, size, centre, kept)
        parts.append(Portion(whole, labels, PictureFiles(folder, names, size, random)))
    test, train = parts if len(parts) == 2 else (parts[0], None)
    return PictureSet(train, test, classes, list(config["mean"]), list(config["std"]))


def data_config(
    preprocessing: str | None, size: int | None, crop_pct: float | None, interpolation: str | None
) -> dict[str, Any]:
    """timm's input_size, interpolation, mean, std, crop_pct and crop_mode."""
    from timm.data import resolve_data_config

    if size is not None and size < 1:
        raise UserError(f"size {size} must be at least 1 pixel")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct {crop_pct} must be in 0 < crop_pct <= 1")
    if interpolation is not None:
        pick("interpolation", INTERPOLATIONS, interpolation)
    own = {"img_size": size, "crop_pct": crop_pct, "interpolation": interpolation}
    return resolve_data_config(own, pretrained_cfg=config_of(preprocessing) if preprocessing else None)


def config_of(model: str) -> dict[str, Any]:
    """timm's description of the pictures that one of its models was trained on. UserError where it has none."""
    import timm

    try:
        known = timm.get_pretrained_cfg(model)
    except RuntimeError:  # timm has the model but not this tag of it
        known = None
    if known is None:
        near = difflib.get_close_matches(model, timm.list_models() + timm.list_pretrained(), n=3)
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise UserError(f"preprocessing {model!r} is no timm model with pictures of its own; {hint}")
    return known.to_dict()


def random_crop(size: int, scale: Sequence[float], interpolation: InterpolationMode) -> v2.Transform:
    """A transform from a PIL picture to (3, size, size) uint8. It draws on torch's random state; timm's would not."""
    if not isinstance(scale, Sequence) or len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"scale {scale} must be two shares of a picture's area, 0 < least <= greatest <= 1")
    return v2.Compose([v2.RandomResizedCrop(size, tuple(scale), interpolation=interpolation), v2.PILToTensor()])


def listing(folder: Path, classes: list[str]) -> tuple[np.ndarray, Tensor]:
    """The pictures of train/ or val/: (paths inside the folder, (N,) bytes; labels, (N,) int64)"""
    paths, labels = zip(*list_files(folder, classes), strict=True)
    start = len(os.path.join(folder, ""))  # relpath takes ten times as long: ten seconds for a million files
    return np.array([os.fsencode(path[start:]) for path in paths]), torch.tensor(labels)


def cache_file(cache: Path, folder: Path, names: np.ndarray, config: dict[str, Any]) -> Path:
    """The cache's file, named by all that decides the pixels: which files, how they are cropped, and which decoder."""
    # Mean and std come after the pixels, except that timm's borders have the mean as their colour.
    free = {"std"} if config["crop_mode"] == "border" else {"mean", "std"}
    what = [str(folder.resolve()), {key: value for key, value in config.items() if key not in free}, PIL.__version__]
    digest = hashlib.sha256(json.dumps(what).encode() + names.tobytes()).hexdigest()[:16]
    return cache / f"{folder.parent.name}-{folder.name}-{config['input_size'][-1]}-{digest}.pixels"
