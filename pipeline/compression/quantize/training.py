"""Weights that learn on their grids: every forward rounds them, and gradients pass as if nothing had been rounded.

A weight w with the scale s and the zero z of its grid enters the forward as (arXiv:1902.08153, eq. 1 and 2)

    w' = s round(clamp(w / s, -z, 2^b - 1 - z)),   where d round(x) / dx is taken to be 1 (arXiv:1308.3432)

so w has the gradient of w' inside the range and none outside (eq. 5), and s that of eq. 3. The scale learns by its
logarithm, so that it stays positive, and so that a step of Adam changes it by a fraction of itself. The zero stays.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.compression.quantize.grids import Grid, as_matrix, as_weight, nearest, spread, values
from pipeline.compression.quantize.network import grids_of, remember_grids_, sites


class Rounded(torch.autograd.Function):
    """The nearest whole numbers, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class OnGrid(nn.Module):
    """The parametrization of a weight that is rounded to its grid in every forward.

    kept: bool of the weight's shape, False where it stays 0 because a mask removed it; None: nowhere.
    """

    def __init__(self, grid: Grid, kept: Tensor | None = None) -> None:
        super().__init__()
        self.laid, self.kept = grid, kept
        self.log_scale = nn.Parameter(grid.scale.log())

    @property
    def grid(self) -> Grid:
        """The grid with the scale that was learnt so far."""
        return replace(self.laid, scale=self.log_scale.exp())

    @property
    def settled(self) -> Grid:
        """That grid as a constant."""
        return replace(self.laid, scale=self.log_scale.detach().exp())

    def forward(self, weight: Tensor) -> Tensor:
        grid, matrix = self.grid, as_matrix(weight, self.laid.dim)
        scale, zero = spread(grid, matrix.shape[1])
        steps = Rounded.apply((matrix.to(scale.dtype) / scale).clamp(-zero, 2**grid.bits - 1 - zero))
        found = as_weight(steps * scale, weight, grid.dim)
        return found if self.kept is None else found * self.kept


@contextmanager
def learning_on_grids(
    model: nn.Module, grids: Mapping[str, Grid], kept: Mapping[int, Tensor] | None = None
) -> Iterator[None]:
    """Inside, these weights are rounded in every forward, and both they and their scales are parameters.

    Afterwards the network is an ordinary one again: its weights lie on the grids that they learnt, which it remembers.
    grids: {weight, a name of `network.sites`: its grid, on the weight's device}. kept: {id of a weight: see OnGrid}.
    """
    weights = {name: site.weight for name, site in sites(model).items() if name in grids}
    rounded = {name: OnGrid(grids[name], (kept or {}).get(id(weight))) for name, weight in weights.items()}
    by_weight = {id(weight): rounded[name] for name, weight in weights.items()}
    # A tied weight has several owners, which share its grid. Their order is kept, as networks are compared by it.
    owners = [
        (layer, name, list(layer._parameters))
        for layer in model.modules()
        for name, weight in layer._parameters.items()
        if id(weight) in by_weight
    ]
    for layer, name, _ in owners:
        parametrize.register_parametrization(layer, name, by_weight[id(layer._parameters[name])])
    yield
    for layer, name, _ in owners:
        parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
    for layer, _, order in owners:
        layer._parameters = {name: layer._parameters[name] for name in order}
    with torch.no_grad():
        for name, weight in weights.items():
            _settle_(weight, rounded[name])
    remember_grids_(model, {**grids_of(model), **{name: one.settled for name, one in rounded.items()}})


def _settle_(weight: Tensor, rounded: OnGrid) -> None:
    grid = rounded.settled
    found = as_weight(values(grid, nearest(grid, as_matrix(weight, grid.dim))), weight, grid.dim)
    weight.copy_(found if rounded.kept is None else found * rounded.kept)
