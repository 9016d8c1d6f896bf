"""The backward pass of networks that oneDNN, by which PyTorch computes convolutions on a CPU, gets wrong.

Without AVX-512 and in channels_last, oneDNN's gradient of a strided 1x1 convolution with fewer than 8 input channels
is written beyond its memory: the process ends, hangs, or goes on with wrong numbers (uxlfoundation/oneDNN issue 6035).
Narrow ResNets, and wide ones that compression made narrow, have such shortcuts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.cpu import has_avx512

BLOCK = 8  # input channels of oneDNN's kernels for AVX2


@contextmanager
def sound_backward(net: nn.Module) -> Iterator[None]:
    """Inside, gradients of this network's weights are right: PyTorch's own kernels compute them where oneDNN's do not.

    The forward pass may be outside.
    """
    onednn: Any = torch.backends.mkldnn
    was = onednn.enabled
    if any(map(overflows, net.modules())) and not has_avx512():
        onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = was


def overflows(layer: nn.Module) -> bool:
    """Whether oneDNN writes this layer's gradient beyond its memory, on a CPU without AVX-512."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.groups == 1
        and layer.in_channels < BLOCK
        and layer.weight.device.type == "cpu"
    )
