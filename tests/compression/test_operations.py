"""Every operation that works on channels by themselves lets them fold: duplicates merge without loss behind it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_nets import between, fold_error, picture, randomise_

from pipeline.compression import channel_groups, compress
from pipeline.compression.trace.rules import RULES

GRID = torch.linspace(-0.9, 0.9, 16).view(1, 4, 4, 1).repeat(2, 1, 1, 2).double()


def positive(x):
    return x.abs() + 0.1


OPERATIONS = {
    "max over space": lambda n, x: x - x.max(-1, keepdim=True).values + x.min(2, keepdim=True)[0],
    "median over space": lambda n, x: x + x.flatten(2).median(-1).values[..., None, None],
    "the larger one": lambda n, x: torch.max(x, x.sin()) + torch.min(x, x.cos()),
    "std and var": lambda n, x: x / (x.std((2, 3), keepdim=True) + x.var((2, 3), keepdim=True, unbiased=False)),
    "std_mean": lambda n, x: (
        x + sum(torch.std_mean(x, (2, 3), keepdim=True)) - torch.var_mean(x, (2, 3), keepdim=True)[1]
    ),
    "logsumexp": lambda n, x: x - x.logsumexp((2, 3), keepdim=True),
    "prod": lambda n, x: x + x.prod(-1, keepdim=True),
    "one slope": lambda n, x: n.act(x),
    "a slope for each": lambda n, x: n.act(x),
    "rrelu": lambda n, x: F.rrelu(x),
    "threshold": lambda n, x: F.threshold(x, 0.1, 0.3),
    "shrinks": lambda n, x: F.softshrink(x, 0.1) + F.hardshrink(x, 0.1) + F.tanhshrink(x) + F.softsign(x),
    "logarithms": lambda n, x: positive(x).log() + positive(x).log1p() + positive(x).log2() + positive(x).log10(),
    "reciprocal": lambda n, x: torch.reciprocal(positive(x)) + x.expm1(),
    "log_sigmoid": lambda n, x: F.logsigmoid(x),
    "nearest": lambda n, x: F.interpolate(F.interpolate(x, scale_factor=2.0), size=4, mode="nearest-exact"),
    "bilinear and bicubic": lambda n, x: F.interpolate(
        F.interpolate(x, size=7, mode="bilinear"), size=4, mode="bicubic"
    ),
    "antialiased": lambda n, x: (
        F.interpolate(x, size=4, mode="bilinear", antialias=True)
        + F.interpolate(x, size=4, mode="bicubic", antialias=True)
    ),
    "linear": lambda n, x: F.interpolate(x.flatten(2), size=16, mode="linear").view_as(x),
    "trilinear": lambda n, x: F.interpolate(x[:, :, None], size=(1, 4, 4), mode="trilinear")[:, :, 0],
    "nearest in 3-D": lambda n, x: F.interpolate(x[:, :, None], size=(1, 4, 4), mode="nearest-exact")[:, :, 0],
    "grid": lambda n, x: F.grid_sample(x, GRID[: len(x)].to(x.dtype), align_corners=False),
    "instance_norm": lambda n, x: n.norm(x),
    "instance_norm with affine": lambda n, x: n.norm(x),
    "instance_norm with statistics": lambda n, x: n.norm(x),
    "pooling with indices": lambda n, x: F.max_pool2d(F.interpolate(x, size=8), 2, return_indices=True)[0],
    "pooling with indices in 1-D": lambda n, x: F.max_pool1d(x.flatten(2), 1, return_indices=True)[0].view_as(x),
    "a depthwise transposed convolution": lambda n, x: n.up(x),
    "a depthwise transposed convolution in 3-D": lambda n, x: n.up(x[:, :, None])[:, :, 0],
}
PARTS = {
    "one slope": {"act": nn.PReLU()},
    "a slope for each": {"act": nn.PReLU(8)},
    "instance_norm": {"norm": nn.InstanceNorm2d(8)},
    "instance_norm with affine": {"norm": nn.InstanceNorm2d(8, affine=True)},
    "instance_norm with statistics": {"norm": nn.InstanceNorm2d(8, affine=True, track_running_stats=True)},
    "a depthwise transposed convolution": {"up": nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8)},
    "a depthwise transposed convolution in 3-D": {
        "up": nn.ConvTranspose3d(8, 8, (1, 3, 3), padding=(0, 1, 1), groups=8)
    },
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_duplicates_fold_without_loss_behind(name):
    model = randomise_(between(OPERATIONS[name], **PARTS.get(name, {}))).double()
    example = picture().double()
    groups = channel_groups(model, example)
    assert [g.name for g in groups] == ["conv1", "conv2", "conv3"], groups.frozen
    assert fold_error(model, example, groups) < 1e-5


WHOLE_GROUPS = {
    "group_norm": (lambda n, x: n.norm(x), {"norm": nn.GroupNorm(4, 8)}),
    "group_norm without affine": (lambda n, x: n.norm(x), {"norm": nn.GroupNorm(4, 8, affine=False)}),
    "transposed": (lambda n, x: n.up(x), {"up": nn.ConvTranspose2d(8, 8, 1, groups=4)}),
    "transposed to more": (lambda n, x: n.up(x)[..., :4, :4], {"up": nn.ConvTranspose2d(8, 16, 2, groups=4)}),
}


@pytest.mark.parametrize("name", WHOLE_GROUPS)
def test_what_belongs_to_a_group_of_channels_goes_with_it(name):
    step, parts = WHOLE_GROUPS[name]
    model, example = between(step, **parts), picture().double()
    if name == "transposed to more":
        model.conv3 = nn.Conv2d(16, 6, 3)
    model = randomise_(model).double()
    groups = channel_groups(model, example)
    [of_groups] = [g for g in groups if g.name.startswith("conv2")]
    assert of_groups.size == 4
    assert fold_error(model, example, groups) < 1e-5
    smaller, _ = compress(model, example, "l1", 0.5)
    assert smaller.conv2.out_channels == 4
    assert smaller(example).shape == (2, 4)


def test_every_name_of_the_table_is_an_operator():
    """A name that no operator has would match nothing, in silence."""
    names = {name for row, _ in RULES for name in row}
    aten = set(dir(torch.ops.aten)) | {
        name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
    }
    assert names - aten == set()
