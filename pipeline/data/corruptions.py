"""Corrupted test pictures, made locally: CORRUPTIONS at severities 1 to 5, in the manner of CIFAR-10-C.

Strengths are those of CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv:1903.12261), which suit pictures of 32 pixels;
on larger pictures blur and pixelation of the same strength are milder. Pictures are (N, C, H, W) in 0 ... 1 and
are rounded to bytes in the end, as files are. The one thing that is ours is fog: its plasma fractal is drawn in Fourier
space, with the spectrum of such fractals. (The package imagecorruptions has strengths for 224 pixels alone.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as transforms

from pipeline.tables import UserError, call, pick
from pipeline.tasks.task import Batch

Corrupt = Callable[[Tensor, Any, Generator], Tensor]  # (pictures, strength, random numbers) -> pictures


def gaussian_noise(x: Tensor, deviation: float, drawn: Generator) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=drawn)


def shot_noise(x: Tensor, photons: float, drawn: Generator) -> Tensor:
    """As many photons as a Poisson process gives, `photons` of them where a pixel is white."""
    return torch.poisson(x * photons, generator=drawn) / photons


def impulse_noise(x: Tensor, amount: float, drawn: Generator) -> Tensor:
    """Salt and pepper on this share of the values."""
    at = torch.rand(x.shape, generator=drawn)
    return torch.where(at < amount / 2, 0.0, torch.where(at < amount, 1.0, x))


def gaussian_blur(x: Tensor, deviation: float, drawn: Generator) -> Tensor:
    side = 2 * int(4 * deviation + 0.5) + 1  # four deviations to either side, as scikit-image cuts it
    return transforms.gaussian_blur(x, [side, side], [deviation, deviation])


def defocus_blur(x: Tensor, strength: tuple[float, float], drawn: Generator) -> Tensor:
    """A disk of this radius in pixels, its edge softened by a Gaussian of this deviation."""
    radius, softness = strength
    reach = max(1, -int(-radius // 1)) + 1
    places = torch.arange(-reach, reach + 1, dtype=x.dtype)
    disk = (places[:, None].square() + places.square() <= radius**2).to(x.dtype)
    disk = transforms.gaussian_blur(disk[None], [3, 3], [softness, softness])[0]
    kernel = (disk / disk.sum()).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, [reach] * 4, mode="reflect"), kernel, groups=x.shape[1])


def fog(x: Tensor, strength: tuple[float, float], drawn: Generator) -> Tensor:
    """Blend with a cloud of this thickness; larger decays of the spectrum make it smoother."""
    thickness, decay = strength
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + thickness * clouds(x, decay, drawn)) * brightest / (brightest + thickness)


def clouds(x: Tensor, decay: float, drawn: Generator) -> Tensor:
    """(N, 1, H, W) in 0 ... 1: noise whose amplitude falls with frequency f as f^-(1 + log2(decay) / 2)."""
    height, width = x.shape[2:]
    frequency = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt()
    power = 1 + torch.log2(torch.tensor(decay)) / 2
    amplitude = torch.where(frequency > 0, frequency.clamp(min=1e-9) ** -power, 0)
    noise = torch.randn(len(x), 1, height, width, generator=drawn)
    made = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(height, width))
    low, high = made.amin((2, 3), keepdim=True), made.amax((2, 3), keepdim=True)
    return (made - low) / (high - low).clamp(min=1e-9)


def brightness(x: Tensor, more: float, drawn: Generator) -> Tensor:
    """Add to the value of HSV, the largest of red, green and blue, and keep hue and saturation."""
    value = x.amax(1, keepdim=True)
    return torch.where(value > 0, x * ((value + more).clamp(max=1) / value.clamp(min=1e-9)), min(more, 1.0))


def contrast(x: Tensor, factor: float, drawn: Generator) -> Tensor:
    middle = x.mean((2, 3), keepdim=True)
    return (x - middle) * factor + middle


def jpeg(x: Tensor, quality: int, drawn: Generator) -> Tensor:
    def compressed(picture: Image.Image) -> Image.Image:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return each(x, compressed)


def pixelate(x: Tensor, factor: float, drawn: Generator) -> Tensor:
    """Shrink to this share of the size by means over boxes, and enlarge by boxes again."""

    def coarse(picture: Image.Image) -> Image.Image:
        small = picture.resize([int(side * factor) for side in picture.size], Image.Resampling.BOX)
        return small.resize(picture.size, Image.Resampling.BOX)

    return each(x, coarse)


def each(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """The pictures, each changed by Pillow as bytes."""
    made = [transforms.pil_to_tensor(change(transforms.to_pil_image(one))) for one in as_bytes(x)]
    return torch.stack(made).to(x.dtype) / 255


# Name: what corrupts, and its strength at severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Corrupt, tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "fog": (fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}


@dataclass(frozen=True)
class Corruptions:
    """Corruptions to evaluate on.

    names: rows of CORRUPTIONS; severity: 1 to 5. mean, std: by which the pictures in a batch are normalised; None: not
    known yet, see `completed`.
    """

    names: tuple[str, ...]
    severity: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            pick("corruption", CORRUPTIONS, name)
        if not self.names:
            raise UserError(f"corruptions names none; choose from: {', '.join(CORRUPTIONS)}, or leave it null")
        if self.severity not in range(1, 6):
            raise UserError(f"corruptions.severity {self.severity} must be a whole number from 1 to 5")

    def completed(self, mean: Sequence[float], std: Sequence[float]) -> "Corruptions":
        """The same, of pictures that are normalised by this mean and std."""
        return replace(self, mean=tuple(mean), std=tuple(std))


def corruptions(asked: Sequence[str] | Mapping[str, Any] | Corruptions | None) -> Corruptions | None:
    """Corruptions from a list of names, or from {"names": [...], other fields}; None: none."""
    if asked is None or isinstance(asked, Corruptions):
        return asked
    if isinstance(asked, str):
        raise UserError(f"corruptions must be a list, such as [{asked}], got {asked!r}")
    given = dict(asked) if isinstance(asked, Mapping) else {"names": asked}
    return call("corruptions", Corruptions, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def corrupted(batches: Iterable[Batch], asked: Corruptions, seed: int = 0) -> Iterator[Batch]:
    """Every batch under each corruption in turn, normalised as before; numbers are drawn by seed, name and batch.

    The global random state stays as it is. Raises UserError for batches that are no pictures with their labels.
    """
    for place, batch in enumerate(batches):
        pictures = pictures_of(batch, asked)
        for number, name in enumerate(CORRUPTIONS):
            if name in asked.names:
                drawn = torch.Generator().manual_seed(seed + 1_000_003 * place + number)
                yield type(batch)([changed(pictures, name, asked, drawn), *batch[1:]])


def pictures_of(batch: Batch, asked: Corruptions) -> Tensor:
    """(N, C, H, W), the first part of a batch, which must be a list or a tuple."""
    pictures = batch[0] if isinstance(batch, list | tuple) and type(batch) in (list, tuple) else None
    if not (isinstance(pictures, Tensor) and pictures.dim() == 4 and pictures.is_floating_point()):
        raise UserError("corruptions are of batches (pictures, labels), and the loader gives others; set it to null")
    if asked.mean is None or asked.std is None:
        raise UserError("corruptions must know how pictures are normalised; give mean= and std= beside names=")
    if not len(asked.mean) == len(asked.std) == pictures.shape[1]:
        raise UserError(f"corruptions.mean and std must have {pictures.shape[1]} values, one for each channel")
    return pictures


def changed(pictures: Tensor, name: str, asked: Corruptions, drawn: Generator) -> Tensor:
    """The normalised pictures under one corruption. Random numbers are drawn on the CPU, so that devices agree."""
    corrupt, strengths = CORRUPTIONS[name]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (asked.mean, asked.std))
    plain = (pictures.detach().cpu().float() * std + mean).clamp(0, 1)
    made = as_bytes(corrupt(plain, strengths[asked.severity - 1], drawn)).float() / 255
    return ((made - mean) / std).to(pictures)


def as_bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)
