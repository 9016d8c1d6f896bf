"""Three forms of CIFAR-10 give one set; a missing or damaged file is named in one line."""

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from pipeline.data import DATASETS
from pipeline.data.cifar10 import CLASSES
from pipeline.tables import UserError

cifar10 = DATASETS["cifar10"]


def test_three_forms_of_cifar10_are_the_same(cifar, cifar_npz, cifar_folder, cifar_pickles):
    loaded = [cifar10.load(root) for root in (cifar_npz, cifar_npz.parent, cifar_folder, cifar_pickles)]
    for pictures in loaded:
        assert np.array_equal(pictures.train.images.permute(0, 2, 3, 1), cifar["x_train"])
        assert np.array_equal(pictures.test.images.permute(0, 2, 3, 1), cifar["x_test"])
        assert np.array_equal(pictures.train.labels, cifar["y_train"])
        assert np.array_equal(pictures.test.labels, cifar["y_test"])
        assert pictures.classes == CLASSES
        assert pictures.mean == loaded[0].mean


def test_cifar10_is_not_fetched_when_there(cifar_npz, cifar_folder, cifar_pickles, offline):
    for root in (cifar_npz, cifar_npz.parent, cifar_folder, cifar_pickles):
        cifar10.fetch(root)


def test_mean_and_std_are_those_of_the_training_pictures(cifar, cifar_npz):
    pictures = cifar10.load(cifar_npz)
    np.testing.assert_allclose(pictures.mean, (cifar["x_train"] / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(pictures.std, (cifar["x_train"] / 255).std((0, 1, 2)))


def test_cifar10_missing(tmp_path):
    with pytest.raises(UserError, match=r"no CIFAR-10 in .*: put cifar10.npz, cifar-10-batches-py/ or train/"):
        cifar10.load(tmp_path)


def test_cifar10_offline(tmp_path, offline):
    with pytest.raises(UserError, match=r"cannot download CIFAR-10 \(.*name resolution.*put cifar-10-python.tar.gz or"):
        cifar10.fetch(tmp_path)


def test_cifar10_half_downloaded_archive(tmp_path, offline):
    (tmp_path / CIFAR10.filename).write_bytes(b"half")
    with pytest.raises(UserError, match=r"delete .*cifar-10-python.tar.gz if its download was cut short"):
        cifar10.fetch(tmp_path)


def test_cifar10_damaged_batch(cifar_pickles):
    (cifar_pickles / CIFAR10.base_folder / "data_batch_3").write_bytes(b"cut")
    (cifar_pickles / CIFAR10.base_folder / "test_batch").unlink()
    with pytest.raises(UserError, match=r"missing or damaged: .*data_batch_3, .*test_batch; delete .*batches-py and"):
        cifar10.load(cifar_pickles)


def test_cifar10_npz_cut_short(cifar_npz):
    cifar_npz.write_bytes(cifar_npz.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cifar10.npz is damaged or half-copied .* delete it and copy it again"):
        cifar10.load(cifar_npz)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": None}, "lacks x_train; it must hold x_train, y_train, x_test, y_test"),
        ({"x_test": np.zeros((20, 32, 32, 3), np.float32)}, "pictures must be uint8 in 0..255, not float32"),
        ({"x_test": np.zeros((20, 3, 32, 32), np.uint8)}, r"\(N, H, W, C\), square, with C 1 or 3, not \(20, 3, 32"),
        ({"x_test": np.zeros((20, 8, 8, 3), np.uint8)}, r"training pictures are \(3, 32, 32\) .* but test .*\(3, 8, 8"),
        ({"y_test": np.zeros(20, np.float32)}, "labels must be integers, not float32"),
        ({"y_test": np.zeros(19, np.int64)}, r"20 pictures but labels of shape \(19,\)"),
        ({"y_test": np.full(20, 10)}, r"labels 10..10 do not fit 10 classes; use 0..9"),
    ],
)
def test_cifar10_npz_with_wrong_arrays(cifar, cifar_npz, change, message):
    np.savez(cifar_npz, **{name: array for name, array in {**cifar, **change}.items() if array is not None})
    with pytest.raises(UserError, match=message):
        cifar10.load(cifar_npz)


def test_cifar10_of_other_classes(make_folder):
    with pytest.raises(UserError, match=r"is not CIFAR-10 \(classes a, b\); use data set 'folder'"):
        cifar10.load(make_folder())
