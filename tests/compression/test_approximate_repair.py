"""Fold-AR: BatchNorm variances of merged channels from the weights, without any picture."""

import pytest
import torch
from torch import nn
from toy_nets import NETS, duplicated, picture, randomise_, relative_error, uneven_projections

from pipeline.compression import Projection, channel_groups, compress
from pipeline.compression.merge.modules import apply
from pipeline.tables import UserError


@pytest.mark.parametrize("norm_scale", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "dense", "mobile", "conv_norms", "applied_twice"])
def test_duplicates_are_wholly_correlated_and_vary_as_before(name, norm_scale):
    model, example, groups, projections = duplicated(name, negative_gains=norm_scale)
    smaller = apply(model, groups, projections, norm_scale, approximate_repair=True)
    with torch.no_grad():
        assert relative_error(model(example), smaller(example)) < 1e-6


@pytest.mark.parametrize("norm_scale", [True, False])
def test_variances_of_independent_channels_are_those_of_their_mean(norm_scale):
    """With random rows and white inputs a channel has the variance ‖w‖², and the mean of N channels 1/N of it."""
    model = randomise_(nn.Sequential(nn.Linear(10000, 60), nn.BatchNorm1d(60), nn.ReLU(), nn.Linear(60, 3))).double()
    with torch.no_grad():
        model[1].weight.fill_(1)
        if norm_scale:
            model[1].weight[::3] = -1
        model[1].running_var.copy_(model[0].weight.square().sum(1))
    groups = channel_groups(model, torch.randn(2, 10000).double())
    labels = torch.cat([torch.arange(20), torch.arange(10).repeat(4)])  # ten clusters of 5, ten single channels
    expected = torch.ones(20, dtype=torch.float64)
    for fixed in (True, False):
        smaller = apply(model, groups, [Projection(labels)], norm_scale, approximate_repair=fixed)
        ratio = smaller[1].running_var / smaller[0].weight.detach().square().sum(1)
        expected[:10] = 1 if fixed else 5
        torch.testing.assert_close(ratio, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "dense", "mobile", "vit"])
def test_outputs_of_norms_grow_by_the_root_of_the_cluster_at_most(name):
    build, example = NETS[name]
    model = randomise_(build(), negative_gains=True)
    groups = channel_groups(model, example)
    projections = uneven_projections(groups)
    plain, mended = (
        apply(model, groups, projections, approximate_repair=fixed).state_dict() for fixed in (False, True)
    )
    changed = {tensor for tensor, value in plain.items() if not torch.equal(value, mended[tensor])}
    assert bool(changed) == (name != "vit")  # LayerNorm keeps no variances
    norms = {norm.var: norm.eps for group in groups for norm in group.norms}
    assert changed <= set(norms)
    most = max(int(projection.counts.max()) for projection in projections)
    for tensor in changed:
        beta = (plain[tensor] + norms[tensor]) / (mended[tensor] + norms[tensor])
        assert ((beta > 0.999) & (beta < most * 1.001)).all()
        assert (beta > 1.1).any()


def test_rows_that_cancel_do_not_blow_up():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight[1] = -model[0].weight[0]
    (group,) = channel_groups(model, torch.randn(2, 4))
    smaller = apply(model, [group], [Projection(torch.zeros(2).long())], approximate_repair=True)
    assert smaller[1].running_var.item() == pytest.approx(0.5, rel=1e-4)
    with torch.no_grad():
        model[0].weight.zero_()
    smaller = apply(model, [group], [Projection(torch.zeros(2).long())], approximate_repair=True)
    assert smaller[1].running_var.item() == pytest.approx(1)


def test_pruning_leaves_nothing_to_repair_and_pictures_say_more():
    build, example = NETS["resnet18"]
    model = randomise_(build())
    plain, mended = (
        compress(model, example, "l2", 0.5, approximate_repair=fixed).model.state_dict() for fixed in (False, True)
    )
    assert all(torch.equal(value, mended[name]) for name, value in plain.items())
    with pytest.raises(UserError, match="guesses variances that pictures measure: choose one"):
        compress(model, example, "fold", 0.5, approximate_repair=True, pictures=picture(batch=8))
