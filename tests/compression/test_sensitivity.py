"""The rise of the loss is foretold: right where it is small, and nothing where nothing is lost."""

import pytest
import torch
import torch.nn.functional as F
from test_blocks import language, texts
from torch import nn
from toy_nets import randomise_

from pipeline.compression import Projection, channel_groups, compress
from pipeline.compression.calibrate.batches import batches_of
from pipeline.compression.calibrate.compensate import second_moments
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.sizes.sensitivity import loss_errors, output_slopes
from pipeline.tables import UserError


def foretold(model, groups, ids, projections):
    tensors, batches = {n: t.detach() for n, t in named_tensors(model).items()}, batches_of(ids)
    slopes = output_slopes(model, groups, batches, answers=lambda output: output.flatten(0, -2))
    moments = second_moments(model, groups, batches)
    return loss_errors(list(groups), tensors, moments, slopes, {0: projections})[0]


def test_a_small_error_is_the_divergence_of_the_two_networks():
    """Under its own labels the loss rises by the mean KL divergence; the second order of it is what is foretold."""
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 5))).double()
    with torch.no_grad():
        model[2].weight.mul_(0.05)  # probabilities hardly vary, so that gradients do not go with inputs
    x = torch.randn(16, 6, dtype=torch.float64)
    many = torch.randn(250, 16, 6, dtype=torch.float64)  # sixteen rows to a sample
    groups = channel_groups(model, x)
    kept = torch.arange(40) < 30
    labels = Projection(torch.where(kept, torch.arange(40), -1))
    found = foretold(model, groups, many, [labels])
    with torch.no_grad():
        inputs = torch.tanh(model[0](many.flatten(0, 1)))
        wanted = model[2](inputs)
        h = inputs.T @ inputs
        a = h[kept][:, kept]
        a.diagonal().mul_(1.01)
        solved = torch.linalg.solve(a, h[kept] @ model[2].weight.T)
        given = inputs[:, kept] @ solved + model[2].bias
        rise = F.kl_div(given.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
    assert found / 16 == pytest.approx(float(rise), rel=0.15)


def test_nothing_is_foretold_where_nothing_is_lost():
    model, ids = language(), texts()
    groups = channel_groups(model, ids, ["hidden"])
    whole = [Projection(torch.arange(g.size)) for g in groups]
    halves = [Projection(torch.where(torch.arange(g.size) < g.size // 2, torch.arange(g.size), -1)) for g in groups]
    assert foretold(model, groups, ids, whole) == 0
    assert foretold(model, groups, ids, halves) > 1e-3
    assert not any(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_convolutions_are_refused_in_one_line():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()))
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(UserError, match=r"spare=loss is for linear layers, and 2\.weight is of a convolution"):
        compress(model, x[:1], "l2", 0.5, pictures=x, allocate="params", spare="loss")
