"""Data sets of pictures and texts: DATASETS names them, AUGMENTATIONS the steps by which training varies pictures.

To add a set, write one file whose `load(**options)` returns a `PictureSet` and add its row here; texts have rows in
pipeline.data.text. `module_of` in pipeline.data.module names the data module that serves a set to Lightning.
"""

from . import cifar10, digits, fashion_mnist, folder, imagenet
from .augment import AUGMENTATIONS, augmentation
from .picture_set import DataSource, PictureSet
from .pictures import Pictures, collate
from .split import split
from .text import TEXTS

DATASETS: dict[str, DataSource] = {
    **TEXTS,
    "cifar10": DataSource(cifar10.load, cifar10.fetch),
    "digits": DataSource(digits.load),
    "fashion_mnist": DataSource(fashion_mnist.load, fashion_mnist.fetch),
    "folder": DataSource(folder.load, root_names_data=True),
    "imagenet": DataSource(imagenet.load, root_names_data=True),
}

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "TEXTS",
    "DataSource",
    "PictureSet",
    "Pictures",
    "augmentation",
    "collate",
    "split",
]
