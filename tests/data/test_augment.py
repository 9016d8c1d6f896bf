"""Augmentations draw for every picture and agree with torchvision's."""

import pickle

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from pipeline.data import AUGMENTATIONS, Pictures
from pipeline.data.augment import crop, flip, rotate_by


@pytest.fixture
def one_picture_many_times():
    picture = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8)
    return picture.expand(64, -1, -1, -1)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("size", [8, 28, 32])
def test_keeps_shape_and_type_and_survives_pickling(name, size):
    augment = pickle.loads(pickle.dumps(AUGMENTATIONS[name](size)))  # worker processes may be spawned
    pictures = torch.randint(0, 256, (6, 1, size, size), dtype=torch.uint8)
    if name == "none":
        assert augment is None
    else:
        assert augment(pictures).shape == pictures.shape
        assert augment(pictures).dtype == torch.uint8


@pytest.mark.parametrize(
    "augment",
    [
        *(AUGMENTATIONS[name](32) for name in sorted(AUGMENTATIONS) if name != "none"),
        v2.RandomCrop(32, padding=4),
        v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]),
    ],
)
def test_pictures_of_a_batch_get_different_draws(augment, one_picture_many_times):
    torch.manual_seed(0)
    pictures = Pictures(one_picture_many_times, torch.zeros(64, dtype=torch.int64), [0.0] * 3, [1.0] * 3, augment)
    batch, _ = pictures.__getitems__(range(64))
    assert len(batch.unique(dim=0)) > 20


def test_crop_takes_every_window_of_the_padded_picture():
    torch.manual_seed(0)
    picture = torch.randint(1, 256, (1, 2, 4, 4), dtype=torch.uint8)
    padded = tv.pad(picture, [1])
    windows = {bytes(tv.crop(padded, top, left, 4, 4).numpy()) for top in range(3) for left in range(3)}
    cropped = crop(picture.expand(300, -1, -1, -1), padding=1)
    assert {bytes(window.contiguous().numpy()) for window in cropped} == windows


def test_flip_mirrors_about_half(one_picture_many_times):
    torch.manual_seed(0)
    mirrored = tv.horizontal_flip(one_picture_many_times[0])
    flipped = sum(torch.equal(picture, mirrored) for picture in flip(one_picture_many_times))
    unchanged = sum(torch.equal(picture, one_picture_many_times[0]) for picture in flip(one_picture_many_times))
    assert 20 < flipped < 44
    assert 20 < unchanged < 44


@pytest.mark.parametrize("size", [8, 28, 32])
def test_rotation_agrees_with_torchvision(size):
    pictures = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8)
    angles = torch.tensor([-15.0, -3.3, 0.0, 7.1, 14.9])
    expected = torch.stack([tv.rotate(p, angle) for p, angle in zip(pictures, angles.tolist(), strict=True)])
    # a sample point half-way between two pixels may round to either
    assert (rotate_by(pictures, angles) == expected).float().mean() > 0.995
