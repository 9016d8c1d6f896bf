"""Gradients are right where oneDNN's are not: strided 1x1 convolutions of few channels, on CPUs without AVX-512."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.backward import overflows, sound_backward
from pipeline.compression.choose.gradients import sample_gradients
from pipeline.sharpness import Ball, worst_case
from pipeline.stages.tune import train_epoch_
from pipeline.tasks import Classification
from pipeline.training import Training

PICTURES = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3
TASK = Classification("multiclass", "logits", classes=3)


class Watched(torch.autograd.Function):
    """The identity, which notes in its backward pass whether oneDNN is on."""

    seen: list[bool] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        Watched.seen.append(torch.backends.mkldnn.enabled)
        return g.clone()


class Narrow(nn.Module):
    """A network with a strided 1x1 convolution; its gradients flow through Watched."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.shortcut = nn.Conv2d(4, channels, 3), nn.Conv2d(channels, 16, 1, stride=2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Watched.apply(self.shortcut(self.stem(x))).mean((2, 3)))


def loss_of(net: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(net(PICTURES), LABELS)


def trained(net: nn.Module, sam: float = 0.0) -> None:
    from lightning import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    module = Training(net, TASK, optim={"name": "sgd", "lr": 0.1}, schedule={"name": "constant"}, sam={"rho": sam})
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=1, logger=False, accelerator="cpu", **quiet)
    loader = DataLoader(TensorDataset(PICTURES, LABELS), 8)
    trainer.fit(module, loader, loader)


WHERE_GRADIENTS_ARE_TAKEN = {
    "stages": lambda net: train_epoch_(net, torch.optim.SGD(net.parameters(), 0.1), [(PICTURES, LABELS)], TASK),
    "training": trained,
    "SAM": lambda net: trained(net, 0.05),
    "methods": lambda net: list(sample_gradients(net, PICTURES, ["shortcut.weight"])),
    "sharpness": lambda net: worst_case(net, lambda: loss_of(net), 0.1, Ball(lambda u, _: u, torch.sign), 2),
}


@pytest.mark.parametrize("where", WHERE_GRADIENTS_ARE_TAKEN)
@pytest.mark.parametrize(("channels", "onednn"), [(4, False), (8, True)])
def test_onednn_is_off_in_every_backward_pass_that_it_gets_wrong(where, channels, onednn, monkeypatch):
    monkeypatch.setattr("pipeline.backward.has_avx512", lambda: False)
    Watched.seen.clear()
    with torch.enable_grad():
        WHERE_GRADIENTS_ARE_TAKEN[where](Narrow(channels))
    assert Watched.seen
    assert set(Watched.seen) == {onednn}
    assert torch.backends.mkldnn.enabled


def test_onednn_stays_on_where_it_is_right(monkeypatch):
    monkeypatch.setattr("pipeline.backward.has_avx512", lambda: True)
    with sound_backward(Narrow()):
        assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("channels", [1, 4, 7, 8])
def test_gradients_of_narrow_strided_convolutions_are_those_of_double_precision(channels):
    net = nn.Conv2d(channels, 16, 1, stride=2).to(memory_format=torch.channels_last)
    pictures = torch.randn(8, channels, 16, 16).to(memory_format=torch.channels_last)
    exact = nn.Conv2d(channels, 16, 1, stride=2).double()
    exact.load_state_dict(net.state_dict())
    for _ in range(20):
        net.zero_grad()
        with sound_backward(net):
            net(pictures).square().sum().backward()
    exact(pictures.double()).square().sum().backward()
    torch.testing.assert_close(net.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("layer", "wrong"),
    [
        (nn.Conv2d(7, 4, 1, stride=2), True),
        (nn.Conv2d(7, 4, 1, stride=(1, 2)), True),
        (nn.Conv2d(8, 4, 1, stride=2), False),
        (nn.Conv2d(4, 4, 1), False),
        (nn.Conv2d(4, 4, 3, stride=2), False),
        (nn.Conv2d(4, 4, 1, stride=2, groups=2), False),
        (nn.Conv2d(4, 4, 1, stride=2, device="meta"), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_the_layers_that_are_wrong(layer, wrong):
    assert overflows(layer) is wrong
