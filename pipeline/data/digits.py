"""The 1,797 handwritten digits that come with scikit-learn: 8x8, grey, no download; for tests and first runs."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from .picture_set import PictureSet, part, picture_set
from .split import split


def load() -> PictureSet:
    digits = load_digits()
    images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # stored as 0..16
    classes = [str(name) for name in digits.target_names]
    # the set has no test part of its own; one fixed cut, so that runs of any seed share it
    cut = split(torch.from_numpy(digits.target), 0.2, seed=0)
    train, test = (part("digits", images[rows], digits.target[rows], classes) for rows in cut)
    return picture_set(train, test, classes)
