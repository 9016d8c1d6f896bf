"""A small network with statistics that are not as new, for tests of stages and chains."""

import torch
from torch import Tensor, nn


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
