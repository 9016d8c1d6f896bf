"""Fixtures that the tests of the engine share."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models import build_model


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """One thread: on tiny tensors more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blobs(n, generator):
    """Noisy pictures of four patterns, which a small network learns in seconds: (n, 3, 8, 8), (n,)."""
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(4, (n,), generator=generator)
    return patterns[labels] + torch.randn(n, 3, 8, 8, generator=generator), labels


@pytest.fixture(scope="session")
def train_data():
    """Sixteen batches of 32 pictures, with labels."""
    generator = torch.Generator().manual_seed(0)
    return [blobs(32, generator) for _ in range(16)]


@pytest.fixture(scope="session")
def trained(train_data):
    """A ResNet18 of width 4 that has learnt its task. Not to be changed."""
    torch.manual_seed(0)
    model = build_model("resnet18", 4, 3, width=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for pictures, labels in train_data:
            loss = F.cross_entropy(model(pictures), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss < 0.3
    return model.eval()
