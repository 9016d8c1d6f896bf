"""Which channels are filters and which neurons."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_nets import NETS, Net, head, picture, vgg

from pipeline.compression import channel_groups, compress
from pipeline.compression.choose.layers import other_units
from pipeline.tables import UserError


def scaled():
    """A gain per channel of shape (C, 1, 1), as ConvNeXt has them: it scales filters and writes none."""
    return Net(
        lambda net, x: head(net, F.relu(net.conv(x) * net.gain)),
        conv=nn.Conv2d(3, 8, 3), gain=nn.Parameter(torch.ones(8, 1, 1)), head=nn.Linear(8, 5),
    )  # fmt: skip


def stream():
    """A stream that a convolution and a linear layer both write."""
    return Net(
        lambda net, x: net.head(net.conv(x).mean((2, 3)) + net.skip(F.relu(net.first(x.mean((2, 3)))))),
        conv=nn.Conv2d(3, 8, 3), first=nn.Linear(3, 6), skip=nn.Linear(6, 8), head=nn.Linear(8, 5),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "example", "filters", "neurons"),
    [
        (*NETS["vgg"], {"0", "4"}, {"8"}),
        (*NETS["mobile"], {"expand", "down"}, set()),
        (*NETS["vit"], set(), {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}),
        (*NETS["embedded"], set(), {"1", "3"}),  # the embedding is neither
        (*NETS["transposed"], {"0", "3", "7"}, set()),
        (scaled, picture(), {"conv"}, set()),
        (stream, picture(), set(), {"first"}),
    ],
    ids=["vgg", "mobile", "vit", "embedded", "transposed", "scaled", "stream"],
)
def test_units(build, example, filters, neurons):
    model = build().eval()
    groups = channel_groups(model, example)
    for units, expected in {"filters": filters, "neurons": neurons, "all": {g.name for g in groups}}.items():
        if expected:
            _, report = compress(model, example, "l1", 0.5, groups=groups, units=units)
            assert {g.name for g in report.groups if g.after < g.before} == expected
            assert all(g.after == g.before // 2 for g in report.groups if g.name in expected)
        else:
            with pytest.raises(UserError, match=rf"{type(model).__name__} has no groups of {units}"):
                other_units(model, groups, units)


def test_units_and_protect_add_up():
    _, report = compress(vgg(), picture(), "l1", 0.5, units="filters", protect=["0"])
    assert {g.name for g in report.groups if g.after < g.before} == {"4"}


def test_errors():
    with pytest.raises(UserError, match=r"unknown units 'filter' \(did you mean 'filters'\?\); choose from: all, fil"):
        compress(vgg(), picture(), "l1", 0.5, units="filter")
    with pytest.raises(UserError, match="ResNet has no groups of neurons, channels that linear layers alone write"):
        compress(NETS["resnet18"][0](), NETS["resnet18"][1], "l1", 0.5, units="neurons")
