"""Pictures behave under every way of fetching them."""

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, Subset

from pipeline.data import DATASETS, Pictures, augmentation, collate, split
from pipeline.data.augment import crop
from pipeline.tables import UserError


@pytest.fixture
def pictures():
    images = torch.arange(30, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
    return Pictures(images, torch.arange(30) % 3, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])


def fetched(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_item_is_the_normalised_picture(pictures):
    picture, label = pictures[7]
    expected = (7 / 255 - torch.tensor(pictures.mean)) / torch.tensor(pictures.std)
    torch.testing.assert_close(picture, expected[:, None, None].expand(3, 4, 4))
    assert label == 1
    assert type(label) is int


def test_batch_equals_its_items(pictures):
    batch, labels = pictures.__getitems__([3, 29, -1])
    assert torch.equal(batch, torch.stack([pictures[i][0] for i in (3, 29, 29)]))
    assert labels.tolist() == [0, 2, 2]


def test_index_past_the_end(pictures):
    with pytest.raises(IndexError):
        pictures[30]


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: Subset(p, range(30)), lambda p: ConcatDataset([p])])
@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_serve_every_picture_in_order(pictures, wrap, workers):
    images, labels = fetched(DataLoader(wrap(pictures), batch_size=7, collate_fn=collate, num_workers=workers))
    assert torch.equal(images, pictures.__getitems__(range(30))[0])
    assert torch.equal(labels, pictures.labels)


def test_spawned_workers(pictures):
    augmented = pictures.subset(range(4), augment=augmentation(["crop", "flip", "rotate"], 4))
    loader = DataLoader(augmented, 2, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(fetched(loader)[1], torch.tensor([0, 1, 2, 0]))


def test_distributed_sampler_shares_out_all_pictures(pictures):
    shares = [DistributedSampler(pictures, num_replicas=2, rank=rank, shuffle=False) for rank in range(2)]
    images = [fetched(DataLoader(pictures, 4, sampler=share, collate_fn=collate))[0] for share in shares]
    assert len(torch.cat(images).unique(dim=0)) == 30


def test_workers_draw_differently():
    image = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(64, -1, -1, -1)
    labels = torch.zeros(64, dtype=torch.int64)
    pictures = Pictures(image, labels, [0.0] * 3, [1.0] * 3, lambda picture: crop(picture[None], 4)[0])
    first, second = (x for x, _ in DataLoader(pictures, 32, collate_fn=collate, num_workers=2))
    assert not torch.equal(first, second)


def test_subset_shares_pixels_and_drops_augmentation(pictures):
    augmented = pictures.subset(range(20), augment=torch.flip)
    part = augmented.subset([5, 2]).subset([1])
    assert part.augment is None
    assert part._images.data_ptr() == pictures._images.data_ptr()
    assert part.images.unique().tolist() == [2]
    assert part.labels.tolist() == [2]
    assert len(part) == 1


def test_training_pictures_normalise_to_mean_0_and_std_1():
    digits = DATASETS["digits"].load()
    pictures = Pictures(digits.train.images, digits.train.labels, digits.mean, digits.std)
    images, _ = pictures.__getitems__(range(len(pictures)))
    assert images.mean().abs() < 1e-5
    assert (images.std(correction=0) - 1).abs() < 1e-5


def test_split_is_disjoint_complete_stratified_and_repeatable():
    labels = torch.arange(10).repeat_interleave(torch.arange(10, 110, 10))
    train, val = split(labels, 0.2, seed=3)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(labels)))
    assert torch.equal(labels[val].bincount(), torch.arange(2, 22, 2))
    assert torch.equal(split(labels, 0.2, seed=3)[1], val)
    assert not torch.equal(split(labels, 0.2, seed=4)[1], val)


def test_split_of_nothing():
    train, val = split(torch.zeros(5, dtype=torch.int64), 0.0, seed=0)
    assert (len(train), len(val)) == (5, 0)


def test_split_too_small_for_the_classes():
    with pytest.raises(UserError, match="a part of 2 of 20 pictures leaves one side without all 10 classes"):
        split(torch.arange(10).repeat(2), 0.1, seed=0)
