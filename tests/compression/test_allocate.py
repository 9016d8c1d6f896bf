"""Sizes under a budget: groups with small errors lose more channels than with uniform sizes."""

import pytest
import torch
from torch import nn
from toy_nets import NETS, randomise_

from pipeline.compression import channel_groups, compress
from pipeline.compression.group import DEFAULT_PARTS
from pipeline.compression.sizes.allocate import costs
from pipeline.compression.sizes.count import macs, parameters
from pipeline.tables import UserError


@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize("name", ["resnet18", "vgg", "transposed", "vit"])
def test_costs_are_those_of_the_smaller_network(name, budget):
    """Costs change as those of the real smaller network: all parameters, and the MACs of layers (not of attention)."""
    build, example = NETS[name]
    model = randomise_(build()).eval()
    groups = channel_groups(model, example)
    cost = costs(model, example, groups, budget)
    smaller, report = compress(model, example, "l1", 0.4, groups=groups)
    before, after = [g.size for g in groups], [g.after for g in report.groups]
    counted = parameters if budget == "params" else lambda net: macs(net, example)
    assert cost(before) - cost(after) == pytest.approx(counted(model) - counted(smaller), rel=1e-9)


def test_what_nobody_reads_goes_first_and_no_budget_is_broken():
    model = randomise_(
        nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
    ).eval()
    with torch.no_grad():
        model[4].weight[:, 4:] = 0  # 16 of the second group's channels are not needed
    pictures = torch.randn(200, 8)
    uniform = compress(model, pictures[:1], "obs", [0.2, 0.5], pictures=pictures)
    for budget in ("params", "macs"):
        sized = compress(model, pictures[:1], "obs", [0.2, 0.5], pictures=pictures, allocate=budget)
        for even, own in zip(uniform, sized, strict=True):
            first, second = own.report.groups
            assert second.after < even.report.groups[1].after < first.after
            left = {"params": lambda r: r.params_after, "macs": lambda r: r.macs_after}[budget]
            assert 0.8 * left(even.report) < left(own.report) <= left(even.report)
            with torch.no_grad():
                wanted = model(pictures)
                errors = [float((net(pictures) - wanted).square().sum()) for net in (even.model, own.model)]
            assert errors[1] < errors[0]


@pytest.mark.parametrize("method", ["fold", "l2"])
def test_without_pictures_what_the_parameters_can_spare_goes_first(method):
    """A group of exact duplicates, or of zeros, loses these before another group loses anything."""
    model = randomise_(
        nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
    ).eval()
    with torch.no_grad():
        for tensor, dim in ((model[2].weight, 0), (model[2].bias, 0), (model[4].weight, 1)):
            first, second = tensor.chunk(2, dim)
            second.copy_(first if method == "fold" else torch.zeros_like(first))
    inputs = torch.randn(50, 8)
    for budget in ("params", "macs"):
        even, own = (compress(model, inputs[:1], method, 0.2, allocate=a) for a in ("uniform", budget))
        first, second = own.report.groups
        assert 10 <= second.after < 16 < first.after
        assert own.report.params_after <= even.report.params_after
        with torch.no_grad():
            wanted = model(inputs)
            errors = [float((net(inputs) - wanted).square().sum()) for net in (even.model, own.model)]
        assert errors[1] < errors[0]


def test_pictures_or_parameters_say_what_is_spared():
    """Most of the second group is read by nothing, which shows in the outputs and not in the weights that write it."""
    model = randomise_(
        nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
    ).train()
    with torch.no_grad():
        model[4].weight[:, 3:] = 0
    pictures = torch.randn(100, 8)

    def sizes(**options):
        smaller, report = compress(model, pictures[:1], "wanda", 0.2, allocate="params", features="writers", **options)
        assert all(module.training for module in smaller.modules())
        return [group.after for group in report.groups]

    seen = sizes(pictures=pictures)
    assert seen == sizes(pictures=pictures, spare="output")
    blind = sizes(pictures=pictures, spare="parameters")
    assert sizes() == sizes(spare="parameters")
    assert seen[1] < blind[1] - 2


def test_heads_of_a_layer_keep_one_size():
    build, example = NETS["vit"]
    model, pictures = randomise_(build()).eval(), torch.randn(8, *example.shape[1:])
    parts = (*DEFAULT_PARTS, "width")
    smaller, report = compress(model, example, "fold", 0.5, parts=parts, pictures=pictures, allocate="macs")
    sizes = {}
    for group in report.groups:
        sizes.setdefault(group.tie or group.name, set()).add(group.after)
    assert all(len(of_tie) == 1 for of_tie in sizes.values())
    assert len({n for of_tie in sizes.values() for n in of_tie}) > 1
    assert smaller(example).shape == model(example).shape


def test_protected_groups_stay_whole():
    build, example = NETS["resnet18"]
    model = randomise_(build()).eval()
    for options in ({}, {"pictures": torch.randn(8, *example.shape[1:]), "allocate": "params"}):
        _, report = compress(model, example, "fold", 0.5, protect=["conv1", "layer1."], **options)
        whole = {group.name for group in report.groups if group.after == group.before}
        protected = {g.name for g in report.groups if g.name.startswith(("conv1", "layer1."))}
        assert protected <= whole < {group.name for group in report.groups}
        assert len(protected) == 3
        if not options:
            assert whole == protected


@pytest.mark.parametrize("spare", ["output", "parameters"])
@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize("name", ["vgg", "vit", "shuffled"])
def test_the_budget_is_that_of_the_whole_network_and_is_used(name, budget, spare):
    """Attention's products outside of layers count, too, and channels that a coarse last step overshot come back."""
    build, example = NETS[name]
    model, pictures = randomise_(build()).eval(), torch.randn(16, *example.shape[1:])
    options = {"parts": (*DEFAULT_PARTS, "width"), "pictures": pictures if spare == "output" else None}
    for ratio in (0.3, 0.6):
        even, own = (compress(model, example, "l2", ratio, allocate=a, **options).report for a in ("uniform", budget))
        left, limit = ((r.macs_after, r.params_after)[budget == "params"] for r in (own, even))
        assert 0.7 * limit < left <= limit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocate": "macs", "spare": "output"}, "spare=output is measured on pictures, so it needs pictures"),
        ({"allocate": "macs", "spare": "outputs"}, "unknown spare 'outputs'.*; choose from: loss, output, parameters"),
        ({"allocate": "flops"}, "unknown allocate 'flops'; choose from: macs, params, uniform"),
        (
            {"protect": ["layer9"]},
            r"no group's name begins with 'layer9' \(did you mean 'layer\d'\?\); there are conv1",
        ),
    ],
)
def test_bad_input(options, message):
    build, example = NETS["resnet18"]
    with pytest.raises(UserError, match=message):
        compress(build(), example, "fold", 0.5, **options)
