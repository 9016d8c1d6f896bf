"""Augmentations draw for every picture and agree with torchvision's."""

import pickle
from collections import Counter

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from pipeline.data import AUGMENTATIONS, Pictures, augmentation
from pipeline.data.augment import crop, flip, one_operation, rotate_by


@pytest.fixture
def one_picture_many_times():
    picture = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8)
    return picture.expand(64, -1, -1, -1)


EVERY = [[name] for name in AUGMENTATIONS] + [["crop", "flip", "rotate"], ["rand_augment", "crop"]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("steps", EVERY, ids="+".join)
def test_keeps_shape_and_type_and_survives_pickling(steps, size, channels):
    augment = pickle.loads(pickle.dumps(augmentation(steps, size)))  # worker processes may be spawned
    pictures = torch.randint(0, 256, (6, channels, size, size), dtype=torch.uint8)
    assert augment(pictures).shape == pictures.shape
    assert augment(pictures).dtype == torch.uint8


def test_no_steps_are_no_augmentation():
    assert augmentation([], 32) is None


def test_steps_are_done_in_the_order_given(one_picture_many_times):
    torch.manual_seed(0)
    both = augmentation(["flip", "crop"], 32)(one_picture_many_times)
    torch.manual_seed(0)
    assert torch.equal(both, crop(flip(one_picture_many_times), padding=4))


@pytest.mark.parametrize(
    "augment",
    [
        *(augmentation(steps, 32) for steps in EVERY if steps != ["flip"]),
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


OPERATIONS = list(v2.RandAugment._AUGMENTATION_SPACE)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("draw", [0.2, 0.5, 0.8])  # up to 0.5 the magnitude is negative
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_rand_augment_operation_gives_what_torchvision_gives(operation, draw, channels, monkeypatch):
    pictures = torch.randint(0, 256, (4, channels, 32, 32), dtype=torch.uint8)
    number = OPERATIONS.index(operation)
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.full(size, number))
    monkeypatch.setattr(torch, "rand", lambda size: torch.full(size, draw))
    policy = v2.RandAugment(num_ops=1)
    assert torch.equal(one_operation(pictures, policy), torch.stack([policy(picture) for picture in pictures]))


def test_rand_augment_draws_operations_and_signs_evenly(monkeypatch):
    torch.manual_seed(0)
    counts = Counter()

    def count(self, pictures, operation, magnitude, **options):
        counts[operation, magnitude < 0] += len(pictures)
        return pictures

    monkeypatch.setattr(v2.RandAugment, "_apply_image_or_video_transform", count)
    per_operation = 2000
    pictures = torch.randint(0, 256, (14 * per_operation, 1, 1, 1), dtype=torch.uint8)
    assert torch.equal(one_operation(pictures, v2.RandAugment()), pictures), "every picture comes back in its place"
    assert len(OPERATIONS) == 14
    for operation, (_, signed) in v2.RandAugment._AUGMENTATION_SPACE.items():
        assert counts[operation, False] + counts[operation, True] == pytest.approx(per_operation, abs=5 * 2000**0.5)
        negative = per_operation / 2 if signed else 0
        assert counts[operation, True] == pytest.approx(negative, abs=5 * 1000**0.5 * signed)


def test_rand_augment_does_two_operations(monkeypatch):
    done = []
    monkeypatch.setattr("pipeline.data.augment.one_operation", lambda pictures, policy: done.append(policy) or pictures)
    augmentation(["rand_augment"], 32)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert [policy.magnitude for policy in done] == [9, 9]


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
