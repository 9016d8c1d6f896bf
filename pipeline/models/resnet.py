"""ResNet (He et al. 2015, arXiv:1512.03385) and PreActResNet (He et al. 2016, arXiv:1603.05027) for small pictures.

The CIFAR stem (3x3, stride 1, no max-pool) and the names of the tensors are those of kuangliu/pytorch-cifar, which the
study's public checkpoints follow. `width` is the number of channels of the first stage; the four stages have
width * (1, 2, 4, 8). `stem_stride` 2 sees pictures at half their size, which takes a quarter of the time.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn, plus the input.

    shortcut: module that the input goes through; None: nothing where the shape stays, else a strided 1x1 convolution.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = shortcut or nn.Sequential()
        if shortcut is None and (stride != 1 or channels_in != channels_out):
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class PreActBlock(nn.Module):
    """bn-relu-conv twice; a projecting shortcut starts after the first activation, an identity one before it."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.shortcut = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + residual


class ResNet(nn.Module):
    """Four stages of residual blocks, global average pooling and a linear classifier.

    Takes (B, channels, H, W) pictures and gives (B, classes) logits.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[PreActBlock],
        depths: tuple[int, ...],
        classes: int,
        channels: int,
        width: int,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, width, stem_stride)
        pre_activated = block is PreActBlock
        if not pre_activated:
            self.bn1 = nn.BatchNorm2d(width)
        channels_in = width
        for stage, depth in enumerate(depths):
            channels_out = width * 2**stage
            blocks = []
            for i in range(depth):
                blocks.append(block(channels_in, channels_out, stride=2 if stage > 0 and i == 0 else 1))
                channels_in = channels_out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        if pre_activated:
            self.bn = nn.BatchNorm2d(channels_in)
        self.linear = nn.Linear(channels_in, classes)
        self.pre_activated = pre_activated
        self.stages = len(depths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.pre_activated:
            x = F.relu(self.bn1(x))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        if self.pre_activated:
            x = F.relu(self.bn(x))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet18(classes: int, channels: int = 3, width: int = 64, stem_stride: int = 1) -> ResNet:
    """ResNet18 with the CIFAR stem: 11.17M parameters at width 64 and 10 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, channels, width, stem_stride)


def preact_resnet18(classes: int, channels: int = 3, width: int = 64, stem_stride: int = 1) -> ResNet:
    """PreActResNet18 with the CIFAR stem: 11.17M parameters at width 64 and 10 classes."""
    return ResNet(PreActBlock, (2, 2, 2, 2), classes, channels, width, stem_stride)
