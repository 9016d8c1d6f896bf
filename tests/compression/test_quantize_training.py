"""Weights that learn on their grids: what gradients they have, and what they are afterwards."""

import pytest
import torch
from torch import nn

from pipeline.compression.quantize.grids import KINDS, PER, Scheme, grid_of
from pipeline.compression.quantize.network import on_grids, sites
from pipeline.compression.quantize.training import OnGrid, learning_on_grids


def grids(model: nn.Module, scheme: Scheme) -> dict:
    return {name: grid_of(site.weight, scheme, site.dim) for name, site in sites(model).items()}


def test_gradients_are_those_of_the_papers_equations():
    """arXiv:1902.08153, eq. 3 and 5, number by number; the gradient of log s is s times that of s."""
    grid = grid_of(
        torch.tensor([[-1.0, 0.0, 0.0, 0.0, 2.0]]), Scheme(2, fit="minmax")
    )  # s = 1, z = 1: the values -1, 0, 1, 2
    one = OnGrid(grid)
    weight = torch.tensor([[0.3, 0.8, -1.6, 2.7, 1.5]], requires_grad=True)
    found = one(weight)
    assert found.tolist() == [[0.0, 1.0, -1.0, 2.0, 2.0]]
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0]])
    (found * upstream).sum().backward()
    assert weight.grad.tolist() == [[1.0, 10.0, 0.0, 0.0, 10000.0]]
    by_scale = [0.0 - 0.3, 1.0 - 0.8, -1.0, 2.0, 2.0 - 1.5]
    expected = sum(u * d for u, d in zip(upstream[0].tolist(), by_scale, strict=True))
    assert float(one.log_scale.grad) == pytest.approx(float(grid.scale) * expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(70, 5),
        nn.Conv2d(6, 4, 3),
        nn.ConvTranspose2d(6, 4, 3),
        nn.Embedding(9, 5),
        nn.Linear(70, 5).bfloat16(),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{layer.weight.dtype}",
)
def test_a_forward_sees_the_values_that_the_weight_ends_on(layer, per, kind):
    kind_before, names, weight = type(layer), list(layer.state_dict()), layer.weight
    with learning_on_grids(layer, grids(layer, Scheme(3, per, 32, kind))):
        with torch.no_grad():
            layer.parametrizations.weight.original.add_(0.05 * torch.randn(weight.shape).to(weight.dtype))
            layer.parametrizations.weight[0].log_scale.add_(0.1)
        seen = layer.weight.detach().clone()
        assert layer.weight.requires_grad
    assert layer.weight is weight
    assert torch.equal(layer.weight, seen)
    assert set(on_grids(layer)) == {"weight"}
    assert (type(layer), list(layer.state_dict())) == (kind_before, names)


class Tied(nn.Module):
    """A tied weight, and attention, whose weights are of other names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.attention, self.said = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 9)
        self.said.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.words(x)
        return self.said(self.attention(x, x, x)[0])


def test_tied_weights_share_one_grid_and_stay_tied():
    net = Tied()
    names = list(net.state_dict())
    with learning_on_grids(net, grids(net, Scheme(2))):
        assert torch.equal(net.words.weight, net.said.weight)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        net(torch.arange(9)[:, None]).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
    assert net.words.weight is net.said.weight
    assert list(net.state_dict()) == names
    assert set(on_grids(net)) == set(sites(net)) == {
        "words.weight", "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip


def test_removed_weights_stay_zero_and_do_not_learn():
    layer = nn.Linear(20, 5)
    kept = torch.rand(5, 20) > 0.5
    with torch.no_grad():
        layer.weight.mul_(kept)
    with learning_on_grids(layer, grids(layer, Scheme(3)), {id(layer.weight): kept}):
        original = layer.parametrizations.weight.original
        layer.weight.sum().backward()
        assert not original.grad[~kept].any()
        assert original.grad[kept].any()
        with torch.no_grad():
            original.add_(1.0)
        assert not layer.weight[~kept].any()
    assert not layer.weight[~kept].any()
    assert set(on_grids(layer)) == {"weight"}
