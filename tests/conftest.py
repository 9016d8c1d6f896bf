"""One thread for each test process, and tiny made data in the real file formats."""

import gzip
import hashlib
import os
import pickle
import struct
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from pipeline.data.cifar10 import CLASSES

sys.path.append(str(Path(__file__).parent / "models"))  # tiny_models serves the tests of the scripts, too

# Two processes with two spinning threads each are ten times slower on two cores than with one.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture
def cifar():
    """A small CIFAR-10 as the four arrays of its npz form, sorted by class, as reading a picture folder gives them."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, per_class in (("train", 5), ("test", 2)):
        arrays[f"x_{name}"] = rng.integers(0, 256, (10 * per_class, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{name}"] = np.repeat(np.arange(10), per_class)
    return arrays


@pytest.fixture
def cifar_npz(cifar, tmp_path):
    path = tmp_path / "npz" / "cifar10.npz"
    path.parent.mkdir()
    np.savez(path, **cifar)
    return path


@pytest.fixture
def cifar_folder(cifar, tmp_path):
    root = tmp_path / "folder"
    for part in ("train", "test"):
        for index, (image, label) in enumerate(zip(cifar[f"x_{part}"], cifar[f"y_{part}"], strict=True)):
            write_picture(root / part / CLASSES[label] / f"{index:05}.png", image)
    return root


@pytest.fixture
def cifar_pickles(cifar, tmp_path, monkeypatch):
    """torchvision's layout; torchvision's checksums are replaced by those of the made files."""
    root = tmp_path / "pickles"
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(images, labels):
        return {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), "labels": labels.tolist(), "old": Old()}

    pieces = zip(np.split(cifar["x_train"], 5), np.split(cifar["y_train"], 5), strict=True)
    train_list = [write(f"data_batch_{i}", batch(*piece)) for i, piece in enumerate(pieces, 1)]
    test_list = [write("test_batch", batch(cifar["x_test"], cifar["y_test"]))]
    name, md5 = write("batches.meta", {"label_names": CLASSES})
    monkeypatch.setattr(CIFAR10, "train_list", train_list)
    monkeypatch.setattr(CIFAR10, "test_list", test_list)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return root


class Old:
    """Unpickles as numpy dtypes of 2009 do, with a flag that is no bool, for which NumPy since 2.4 warns."""

    def __reduce__(self):
        return np.dtype, ("u1", 1, 1)


@pytest.fixture
def fashion(tmp_path):
    """Debian's layout: four gzipped idx files in one folder."""
    rng = np.random.default_rng(0)
    for stem, count in (("train", 40), ("t10k", 20)):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def story(tmp_path):
    """A text file that a language model can train on: 40 short documents, so that every part of it has some."""
    words = np.random.default_rng(0).choice(["the cat", "a dog", "sat", "ran", "on", "to", "mat", "door"], (40, 60))
    path = tmp_path / "story.txt"
    path.write_text("<|endoftext|>".join(" ".join(row) for row in words))
    return path


@pytest.fixture
def make_folder(tmp_path):
    """A picture folder of two classes, one picture (height, width[, 3]) of each in train and in test."""

    def make(shape=(6, 6, 3), test="test", suffix=".png"):
        rng = np.random.default_rng(0)
        for part in ("train", test):
            for name in ("b", "a"):
                path = tmp_path / part / name / f"one{suffix}"
                write_picture(path, rng.integers(0, 256, shape, dtype=np.uint8))
        return tmp_path

    return make


@pytest.fixture(name="write_picture")
def picture_writer():
    return write_picture


@pytest.fixture(name="write_idx")
def idx_writer():
    return write_idx


def write_picture(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_idx(path, array):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
