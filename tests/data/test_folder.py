"""Any picture folder loads, and every fault in it is named in one line."""

import numpy as np
import pytest

from pipeline.data import DATASETS
from pipeline.tables import UserError

folder = DATASETS["folder"]


def test_folder_sorts_classes_and_ignores_other_files(make_folder):
    root = make_folder()
    (root / "train" / "notes.txt").write_text("not a class")
    (root / "train" / "a" / "notes.txt").write_text("not a picture")
    (root / "train" / "a" / "._one.png").write_bytes(b"left by macOS")
    (root / "train" / ".cache").mkdir()
    pictures = folder.load(root)
    assert pictures.classes == ["a", "b"]
    assert pictures.train.labels.tolist() == [0, 1]
    assert pictures.train.images.shape == (2, 3, 6, 6)


def test_folder_takes_val_for_test(make_folder):
    assert len(folder.load(make_folder(test="val")).test.labels) == 2


def test_folder_of_grey_pictures_has_one_channel(make_folder):
    assert folder.load(make_folder(shape=(6, 6))).train.images.shape == (2, 1, 6, 6)


def test_folder_of_grey_and_colour_is_colour(make_folder, write_picture):
    root = make_folder()
    grey = np.full((6, 6), 99, np.uint8)
    write_picture(root / "test" / "a" / "grey.png", grey)
    pictures = folder.load(root)
    assert pictures.train.images.shape[1] == 3
    assert (pictures.test.images[0] == 99).all()


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_folder_resizes_and_crops(make_folder, suffix):
    assert folder.load(make_folder(shape=(10, 16, 3), suffix=suffix), size=8).train.images.shape == (2, 3, 8, 8)


def test_folder_of_different_sizes(make_folder, write_picture):
    root = make_folder()
    write_picture(root / "test" / "b" / "wide.png", np.zeros((6, 9, 3), np.uint8))
    with pytest.raises(UserError, match=r"differ in size: .*one.png is 6x6 but .*wide.png is 9x6; set size"):
        folder.load(root)


def test_folder_of_oblong_pictures(make_folder):
    with pytest.raises(UserError, match="square"):
        folder.load(make_folder(shape=(6, 9, 3)))


@pytest.mark.parametrize("size", [None, 8])
def test_folder_with_a_damaged_picture(make_folder, size):
    path = make_folder() / "train" / "b" / "one.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"cannot read picture .*train/b/one.png \(.*\); replace or delete it"):
        folder.load(path.parents[2], size=size)


def test_folder_with_16_bit_pictures(make_folder, write_picture):
    root = make_folder()
    write_picture(root / "train" / "a" / "deep.png", np.full((6, 6), 4000, np.uint16))
    with pytest.raises(UserError, match=r"deep.png \(mode I;16, more than 8 bits per channel\)"):
        folder.load(root)


def test_folder_with_an_empty_class(make_folder):
    root = make_folder()
    (root / "train" / "a" / "one.png").unlink()
    with pytest.raises(UserError, match=r"class folder .*train/a has no pictures"):
        folder.load(root)


def test_folder_whose_parts_differ_in_classes(make_folder):
    root = make_folder()
    (root / "test" / "c").mkdir()
    with pytest.raises(UserError, match=r"same classes; only one of them has: c"):
        folder.load(root)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("", r"no folder .*train; put pictures in train/<class>/"),
        ("train/a", r"no folder .*test or .*val; put pictures in test/<class>/"),
    ],
)
def test_folder_without_its_parts(tmp_path, make, message):
    (tmp_path / make).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=message):
        folder.load(tmp_path)


def test_folder_without_classes(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"train has no class folders"):
        folder.load(tmp_path)


def test_folder_needs_root():
    with pytest.raises(UserError, match="data set 'folder' needs root"):
        folder.load()


def test_folder_of_no_size(tmp_path):
    with pytest.raises(UserError, match="size 0 must be at least 1 pixel"):
        folder.load(tmp_path, size=0)
