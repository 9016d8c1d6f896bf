"""Fashion-MNIST reads plain and gzipped idx files; a missing or damaged file is named in one line."""

import gzip

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST

from pipeline.data import DATASETS
from pipeline.tables import UserError

fashion_mnist = DATASETS["fashion_mnist"]


def test_fashion_mnist_plain_and_gzipped_are_the_same(fashion, write_idx):
    zipped = fashion_mnist.load(fashion)
    raw = fashion / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in fashion.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    plain = fashion_mnist.load(fashion)
    assert zipped.train.images.shape == (40, 1, 28, 28)
    assert torch.equal(zipped.train.images, plain.train.images)
    assert torch.equal(zipped.test.labels, plain.test.labels)
    # torchvision reads the same files to the same pictures
    assert torch.equal(FashionMNIST(fashion).data, plain.train.images[:, 0])


def test_fashion_mnist_is_not_fetched_when_there(fashion, offline):
    fashion_mnist.fetch(fashion)


def test_fashion_mnist_missing_files(fashion):
    (fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"no Fashion-MNIST in .*: put t10k-labels-idx1-ubyte there, plain or as .gz"):
        fashion_mnist.load(fashion)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # torchvision leaves its mirrors' responses to the collector
def test_fashion_mnist_offline(tmp_path, offline):
    with pytest.raises(UserError, match=r"cannot download Fashion-MNIST \(.*name resolution.*put train-images-idx3"):
        fashion_mnist.fetch(tmp_path)


def test_fashion_mnist_gz_cut_short(fashion):
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is damaged or half-downloaded .* delete it"):
        fashion_mnist.load(fashion)


def test_fashion_mnist_idx_cut_short(fashion):
    content = gzip.decompress((fashion / "train-labels-idx1-ubyte.gz").read_bytes())
    (fashion / "train-labels-idx1-ubyte").write_bytes(content[:-1])
    with pytest.raises(UserError, match="train-labels-idx1-ubyte has 47 bytes where its header asks for 48; delete"):
        fashion_mnist.load(fashion)


def test_fashion_mnist_wrong_file(fashion):
    (fashion / "train-images-idx3-ubyte").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="train-images-idx3-ubyte is no idx file of bytes with 3 axes"):
        fashion_mnist.load(fashion)


def test_fashion_mnist_count_mismatch(fashion, write_idx):
    write_idx(fashion / "train-labels-idx1-ubyte.gz", np.zeros(39, np.uint8))
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte.gz: 40 pictures but labels of shape \(39,\)"):
        fashion_mnist.load(fashion)
