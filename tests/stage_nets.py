"""Networks for tests of stages and chains: one with statistics that are not as new, and one that reads digits."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.data.module import PictureData
from pipeline.evaluate import metrics_of
from pipeline.models import build_model
from pipeline.models.checkpoint import load_into
from pipeline.tasks import Classification

GOLDEN = Path(__file__).parent / "golden" / "resnet18_digits.safetensors"
TASK = Classification("multiclass", "logits", classes=10)


class Untouchable:
    """Labels that nobody may look at."""

    def __getattr__(self, name: str):
        raise AssertionError(f"a label was asked for its {name}")


def digits_data() -> PictureData:
    data = PictureData("digits")
    data.setup()
    return data


def digits_net() -> nn.Module:
    """A trained one."""
    net = build_model("resnet18", classes=10, channels=1, width=4)
    load_into(net, load_file(GOLDEN), GOLDEN)
    return net.eval()


def accuracy(net: nn.Module, digits: PictureData) -> float:
    return metrics_of(net, TASK, [digits.test_data.__getitems__(range(360))])["acc"]


def net(pictures: Tensor, passes: int = 1) -> nn.Module:
    """pictures: (N, 3, H, W) that its BatchNorms see, in so many passes. It says four classes."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    for _ in range(passes):
        made(pictures)
    return made.eval()
