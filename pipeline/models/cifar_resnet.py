"""The CIFAR ResNets of He et al. 2015 (arXiv:1512.03385, section 4.2): three stages of 16, 32 and 64 channels.

Their shortcuts have no parameters (every second pixel, padded with zero channels), so the residual streams cannot be
compressed and the hidden channels of the blocks can. Tensor names are those of akamaster/pytorch_resnet_cifar10.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.resnet import BasicBlock, conv3x3


class PaddedShortcut(nn.Module):
    """Every `stride`-th pixel, with `padding` zero channels on either side."""

    def __init__(self, stride: int, padding: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """(B, channels, H, W) pictures to (B, classes) logits; 6 * depth + 2 layers."""

    def __init__(self, depth: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        channels_in = 16
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                changes = channels_in != width
                shortcut = PaddedShortcut(stride, (width - channels_in) // 2) if changes else None
                blocks.append(BasicBlock(channels_in, width, stride, shortcut))
                channels_in = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20(classes: int, channels: int = 3) -> CifarResNet:
    """ResNet-20: 0.27M parameters."""
    return CifarResNet(3, classes, channels)


def resnet32(classes: int, channels: int = 3) -> CifarResNet:
    """ResNet-32: 0.46M parameters."""
    return CifarResNet(5, classes, channels)
