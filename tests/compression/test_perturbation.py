"""The pair of layers that a perturbation is measured on is the compressed network's own, and no bound is broken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_nets import randomise_

from pipeline.compression import channel_groups, compress
from pipeline.compression.perturbation import affine, operator_norm, pair_perturbation, patches, spread

CONVS = {"plain": {}, "biased": {"bias": True}, "strided": {"stride": 2, "padding": 0}}


def pair(**options):
    """A convolution with its norm, ReLU and a reader, ready to be compressed."""
    conv = nn.Conv2d(3, 6, 3, **{"padding": 1, "bias": False, **options})
    net = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1, bias=False))
    return randomise_(net).requires_grad_(False)


def pictures():
    return torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_rows_and_patches_are_the_convolution_and_its_norm(options):
    net, x = pair(**options), pictures()
    found = affine(net[0], net[1]) @ patches(x.double(), net[0])
    torch.testing.assert_close(found, net[1](net[0](x)).flatten(2).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["fold", "mix", "l2"])
@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_what_is_measured_is_what_the_smaller_network_answers(options, method):
    net, x = pair(**options), pictures()
    smaller, report = compress(net, x[:1], method, 0.5, groups=channel_groups(net, x[:1]))
    (projection,) = report.plan.projections
    rows, moved = affine(net[0], net[1]), spread(affine(smaller[0], smaller[1]), projection)
    found = pair_perturbation(rows, moved, net[0], net[3], x)
    dense = net(x).flatten(1)
    expected = ((dense - smaller(x).flatten(1)).norm(dim=1) / dense.norm(dim=1)).mean()
    assert found.measured == pytest.approx(float(expected), rel=1e-4)
    assert 0 < found.measured <= found.seen <= found.spectral <= found.frobenius


def test_nothing_changes_where_nothing_is_merged():
    net = pair()
    rows = affine(net[0], net[1])
    found = pair_perturbation(rows, rows, net[0], net[3], pictures())
    assert (found.measured, found.seen, found.spectral, found.frobenius) == (0, 0, 0, 0)


def test_an_operator_norm_is_the_largest_singular_value_of_the_whole_matrix():
    conv = pair()[3].double()
    columns = torch.eye(6 * 9, dtype=torch.float64).reshape(-1, 6, 3, 3)
    matrix = conv(columns).flatten(1).T
    norm = operator_norm(lambda x: F.conv2d(x, conv.weight, None, 1, 1), (1, 6, 3, 3))
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)


def test_convolutions_in_groups_have_no_such_patches():
    with pytest.raises(ValueError, match="without groups and dilation"):
        patches(torch.ones(1, 4, 5, 5), nn.Conv2d(4, 4, 3, groups=2))
