"""Training augmentations: a table of single steps, each from the picture size to a transform of uint8 pictures."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from pipeline.tables import UserError, pick


class PerPicture(v2.Compose):
    """Steps that map a batch (B, C, H, W) uint8 to such a batch, drawing for every picture on its own.

    torchvision's random transforms draw once per call, so on a batch tensor all pictures would get the same crop. A
    loop over pictures costs 7 ms (crop, flip) to 30 ms (and rotation) per 128 CIFAR pictures on one core, more than a
    training step on a GPU. The steps below draw a vector instead: 1 ms and 3 ms. Tests compare them with torchvision's.
    Any other transform goes through `each`, at the price of that loop (TrivialAugment: 22 ms).
    """


def each(pictures: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """`transform`, any transform of one picture (C, H, W), called for each picture of the batch (B, C, H, W)."""
    return torch.stack([transform(picture) for picture in pictures])


def crop(pictures: Tensor, padding: int) -> Tensor:
    """RandomCrop to the old size after `padding` pixels of zeros on every side."""
    count, _, height, width = pictures.shape
    top, left = torch.randint(2 * padding + 1, (2, count))
    windows = F.pad(pictures, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count), :, top, left]


def flip(pictures: Tensor) -> Tensor:
    """RandomHorizontalFlip with probability one half."""
    return torch.where(torch.rand(len(pictures), 1, 1, 1) < 0.5, pictures.flip(-1), pictures)


def rotate(pictures: Tensor, degrees: float) -> Tensor:
    """RandomRotation by up to `degrees` either way: nearest neighbour, zeros outside, as torchvision's default."""
    angles = torch.empty(len(pictures)).uniform_(-degrees, degrees)
    return rotate_by(pictures, angles)


def rotate_by(pictures: Tensor, angles: Tensor) -> Tensor:
    """Square pictures (B, C, H, H) turned counter-clockwise by `angles: (B,)` degrees."""
    cos, sin = torch.deg2rad(angles).cos(), torch.deg2rad(angles).sin()
    zero = torch.zeros_like(cos)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures.float(), grid, mode="nearest", align_corners=False).to(pictures.dtype)


def rand_augment(pictures: Tensor, policy: v2.RandAugment) -> Tensor:
    """RandAugment (arXiv:1909.13719): `policy.num_ops` operations in turn, drawn for every picture on its own."""
    for _ in range(policy.num_ops):
        pictures = one_operation(pictures, policy)
    return pictures


def one_operation(pictures: Tensor, policy: v2.RandAugment) -> Tensor:
    """One of the policy's operations on every picture, each called once for all pictures that drew it and its sign.

    A call per picture takes 42 ms per 128 CIFAR pictures on one core, this takes 12 ms. torchvision has no public way
    to name the operation, so private names of the policy are used; a test compares every operation with its result.
    """
    count, _, height, width = pictures.shape
    space = policy._AUGMENTATION_SPACE
    drawn = torch.randint(len(space), (count,))
    negative = torch.rand((count,)) <= 0.5
    result = torch.empty_like(pictures)
    for number, (operation, (bins, signed)) in enumerate(space.items()):
        magnitudes = bins(policy.num_magnitude_bins, height, width)
        magnitude = 0.0 if magnitudes is None else float(magnitudes[policy.magnitude])
        chosen = drawn == number
        groups = [(chosen & negative, -magnitude), (chosen & ~negative, magnitude)] if signed else [(chosen, magnitude)]
        for rows, value in groups:
            if rows.any():
                result[rows] = policy._apply_image_or_video_transform(
                    pictures[rows], operation, value, interpolation=policy.interpolation, fill=policy._fill
                )
    return result


# name -> (picture size in pixels -> function of a batch). Padding is 4 pixels for pictures of 32, and scales with size.
AUGMENTATIONS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "crop": lambda size: partial(crop, padding=size // 8),
    "flip": lambda size: flip,  # wrong for pictures whose mirror image means something else, such as digits
    "rotate": lambda size: partial(rotate, degrees=15),
    "rand_augment": lambda size: partial(rand_augment, policy=v2.RandAugment()),
    "trivial_augment": lambda size: partial(each, transform=v2.TrivialAugmentWide()),
}


def augmentation(steps: Sequence[str], size: int) -> PerPicture | None:
    """The rows of AUGMENTATIONS named in `steps`, one after the other, for pictures of `size` pixels; None for none."""
    check_steps(steps)
    return PerPicture([AUGMENTATIONS[step](size) for step in steps]) if steps else None


def check_steps(steps: Sequence[str]) -> None:
    """UserError unless `steps` is a list of different rows of AUGMENTATIONS."""
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise UserError(f"augment must be a list of steps, such as [crop, flip] or [] for none, got {steps!r}")
    for position, step in enumerate(steps):
        pick("augmentation", AUGMENTATIONS, step)
        if step in steps[:position]:
            raise UserError(f"augment names {step!r} twice; name every step once")


def mixing(mixup: float, cutmix: float, classes: int) -> v2.Transform | None:
    """MixUp (arXiv:1710.09412), CutMix (arXiv:1905.04899), or for each batch one of both at random; None for neither.

    Maps (B, C, H, W) float pictures and (B,) int64 labels to pictures and (B, classes) float32 probabilities.
    mixup, cutmix: alpha of the Beta(alpha, alpha) distribution of the weight in the mixture, 0: off
    """
    alphas = {v2.MixUp: mixup, v2.CutMix: cutmix}
    transforms = [kind(alpha=alpha, num_classes=classes) for kind, alpha in alphas.items() if alpha > 0]
    return v2.RandomChoice(transforms) if len(transforms) > 1 else next(iter(transforms), None)


def check_alpha(name: str, alpha: float) -> None:
    """UserError unless `alpha` is useful in a Beta distribution: at 100 every weight is near one half."""
    if not 0 <= alpha <= 100:
        raise UserError(f"{name} {alpha} must be in 0 <= alpha <= 100: 0 for none, usually 0.2 to 1")
