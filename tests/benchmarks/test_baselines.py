"""Baselines do what their papers say, on networks small enough to know the answer."""

import pytest
import torch
from torch import nn

from benchmarks.baselines import LADDER, channel_pruning, lasso_choice, of_channels, sequential_grail
from pipeline.compression import channel_groups, compress
from pipeline.compression.budget import first_channels
from pipeline.compression.calibrate.batches import batches_of
from pipeline.compression.calibrate.compensate import observe
from pipeline.compression.plan import Plan


@pytest.fixture
def net() -> nn.Module:
    """Three convolutions, so that two groups stand one behind the other; half of their channels are nearly copies."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)]
    with torch.no_grad():
        for layer in (layers[0], layers[3]):
            half = layer.out_channels // 2
            layer.weight[half:] = 0.7 * layer.weight[:half] + 0.02 * torch.randn_like(layer.weight[:half])
            layer.bias[half:] = 0.7 * layer.bias[:half]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(48, 2, 10, 10, generator=torch.Generator().manual_seed(1))


def plan_of(net: nn.Module, pictures: torch.Tensor, method: str = "l1") -> Plan:
    return compress(net, pictures[:1], method, 0.5).report.plan


def loss(smaller: nn.Module, net: nn.Module, pictures: torch.Tensor) -> float:
    with torch.no_grad():
        return float((smaller(pictures) - net(pictures)).norm() / net(pictures).norm())


@pytest.mark.parametrize("step", LADDER)
def test_every_step_of_the_ladder_is_better_than_no_solving(step, net, pictures):
    plan = plan_of(net, pictures)
    seen = observe(net, plan.groups, batches_of(pictures))
    alone = compress(net, pictures[:1], "l1", 0.5).model
    assert loss(LADDER[step](net, plan, seen), net, pictures) < 0.8 * loss(alone, net, pictures)


def test_the_last_step_of_the_ladder_is_the_recipe_with_data(net, pictures):
    plan = plan_of(net, pictures)
    ours = LADDER["+ statistics"](net, plan, observe(net, plan.groups, batches_of(pictures)))
    recipe = compress(net, pictures[:1], "l1+data", 0.5, pictures=pictures).model
    with torch.no_grad():
        assert torch.equal(ours(pictures), recipe(pictures))


def test_grail_in_sequence_is_grail_where_there_is_one_group(pictures):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3)).eval()
    plan = plan_of(net, pictures)
    alone = compress(net, pictures[:1], "l1+grail", 0.5, pictures=pictures).model
    with torch.no_grad():
        torch.testing.assert_close(sequential_grail(net, plan, batches_of(pictures))(pictures), alone(pictures))


def test_grail_in_sequence_solves_a_later_group_on_what_reaches_it(net, pictures):
    plan = plan_of(net, pictures)
    turns = sequential_grail(net, plan, batches_of(pictures))
    once = compress(net, pictures[:1], "l1+grail", 0.5, pictures=pictures).model
    assert torch.equal(turns[3].weight, once[3].weight), "nothing is compressed before the first group"
    assert not torch.allclose(turns[5].weight, once[5].weight)


def test_channel_pruning_drops_channels_that_contribute_nothing(net, pictures):
    with torch.no_grad():
        net[3].weight[:, 3:] = 0
        net[5].weight[:, :4] = 0
    plan = plan_of(net, pictures)
    smaller = channel_pruning(net, plan, observe(net, plan.groups, batches_of(pictures)))
    assert [smaller[0].out_channels, smaller[3].out_channels] == [3, 4]
    assert loss(smaller, net, pictures) < 1e-2, "what is left of the ridge"


def test_channel_pruning_leaves_statistics_and_a_group_that_keeps_all_channels(net, pictures):
    groups = channel_groups(net, pictures[:1])
    plan = Plan(groups, [first_channels(groups[0].size, groups[0].size), first_channels(groups[1].size, 4)])
    smaller = channel_pruning(net, plan, observe(net, groups, batches_of(pictures)))
    assert torch.equal(smaller[0].weight, net[0].weight)
    assert torch.equal(smaller[1].running_var, net[1].running_var)


def test_the_inner_products_of_channels_are_those_of_their_outputs():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, bias=False)
    rows = torch.randn(50, 27, dtype=torch.float64)
    weight = layer.weight.detach().double().flatten(1).T
    outputs = torch.stack([rows[:, 9 * i : 9 * i + 9] @ weight[9 * i : 9 * i + 9] for i in range(3)]).flatten(1)
    torch.testing.assert_close(of_channels(rows.T @ rows, layer), outputs @ outputs.T)


def test_the_lasso_drops_one_of_two_channels_that_say_the_same():
    """Channels 0 and 1 are large and alike, channel 2 is smaller and says something else: by size it would go first."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 200, generator=generator, dtype=torch.float64)
    outputs = torch.stack([one, 1.01 * one, 0.6 * other])
    labels = lasso_choice(outputs @ outputs.T, 2).labels
    assert labels[2] >= 0
    assert (labels >= 0).sum() == 2
