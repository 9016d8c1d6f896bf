"""Synthetic pictures, made from a checkpoint alone, for methods that need pictures where no data is at hand.

BatchNorm keeps the mean and the variance of every channel over the training pictures. Noise of a natural spectrum is
optimised until it has the same statistics in all layers (DeepInversion, arXiv:1912.08795, eq. 3-4, without labels;
ZeroQ, arXiv:2001.00281). Correlations of channels on such pictures come near to those on real ones.

Late layers see few pixels of each picture, so their correlations need many pictures. Pictures are made in batches whose
statistics are matched one by one, so memory does not grow with their number.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.compensate import channel_moments
from pipeline.compression.calibrate.repair import tracked_norms
from pipeline.compression.copies import bare_copy
from pipeline.example import Example
from pipeline.tables import UserError

COUNT = 512  # pictures, as many as are taken of data
BATCH = 128


def synthesize(
    model: nn.Module, example: Example, count: int = COUNT, steps: int = 40, lr: float = 0.1, seed: int = 0
) -> Tensor:
    """(count, C, H, W) synthetic network inputs like example (N, C, H, W), on its device; the model is untouched.

    steps, lr: for Adam on the mismatch of BatchNorm statistics; a network without these statistics gets the noise.
    Raises UserError where the example is no batch of pictures.
    """
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
        raise UserError("synthetic inputs are made for networks of pictures (N, C, H, W); pass unlabelled data instead")
    generator = torch.Generator().manual_seed(seed)
    net = bare_copy(model).eval().requires_grad_(False)
    norms = list(tracked_norms(net).values())
    mismatches: list[Tensor] = []

    def compare(norm: Any, given: tuple[Tensor, ...]) -> None:
        var, mean = channel_moments(given[0], correction=1)  # as BatchNorm keeps it
        expected = norm.running_var + norm.eps
        mismatches.append(((mean - norm.running_mean) ** 2 / expected).mean())
        mismatches.append(((var / expected).clamp(min=1e-3).log() ** 2).mean())

    for norm in norms:
        norm.register_forward_pre_hook(compare)
    batches = []
    # A rest of fewer than half a batch joins the last one: a single picture has no variance where it is one pixel.
    for start, end in pairwise([0, *range(BATCH, count - BATCH // 2 + 1, BATCH), count]):
        pictures = natural_noise((end - start, *example.shape[1:]), generator).to(example)
        if norms:
            pictures = pictures.to(memory_format=torch.channels_last).requires_grad_()
            optimizer = torch.optim.Adam([pictures], lr, betas=(0.5, 0.9))
            with torch.enable_grad():
                for _ in range(steps):
                    mismatches.clear()
                    net(pictures)
                    (pictures.grad,) = torch.autograd.grad(torch.stack(mismatches).mean(), pictures)
                    optimizer.step()
        batches.append(pictures.detach())
    return torch.cat(batches)


def natural_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Gaussian noise whose amplitude falls with the frequency, 1/f as in natural pictures; mean 0, variance 1."""
    noise = torch.randn(*shape, generator=generator)
    frequency = torch.cartesian_prod(torch.fft.fftfreq(shape[-2]), torch.fft.fftfreq(shape[-1])).norm(dim=1)
    frequency = frequency.view(*shape[-2:]).clamp(min=1 / max(shape[-2:]))
    spectrum = torch.fft.fft2(noise) / frequency
    spectrum[..., 0, 0] = 0
    noise = torch.fft.ifft2(spectrum).real
    return noise / noise.std()
