"""The digits are complete and their test part is fixed."""

import torch

from pipeline.data import DATASETS


def test_digits_are_all_there_in_full_range():
    digits = DATASETS["digits"].load()
    assert digits.train.images.shape == (1437, 1, 8, 8)
    assert digits.test.images.shape == (360, 1, 8, 8)
    assert digits.train.images.unique().tolist()[:2] == [0, 16]
    assert digits.train.images.max() == 255
    assert torch.equal(digits.test.labels, DATASETS["digits"].load().test.labels)
    assert digits.test.labels.bincount().min() >= 34
