"""The weights of a network on grids: which can be, which are, and what the network remembers of them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pipeline.compression.calibrate.batches import Batches
from pipeline.compression.calibrate.compensate import input_moments
from pipeline.compression.calibrate.lockstep import Stop, forward, watched
from pipeline.compression.calibrate.repair import kept_modes
from pipeline.compression.calibrate.rows import input_dim, sees_patches
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.quantize.grids import Grid, Scheme, as_matrix, as_weight, codes_on, grid_of, nearest, values
from pipeline.compression.quantize.rounding import gptq
from pipeline.example import Example

GRIDS = "weight_grids"  # attribute of a network: {weight: its Grid}; copies of the network keep it
MOST_ROWS = 2**15  # rows of a layer's inputs that second moments go by, at most


class Site(NamedTuple):
    """A weight that can lie on a grid. name: its own, the first if it is tied; dim: along which its rows stand."""

    name: str
    layer: nn.Module
    weight: nn.Parameter
    dim: int


def sites(model: nn.Module) -> dict[str, Site]:
    """{weight: its site} of convolutions, linear layers, embeddings and attention, each tied weight once.

    Weights that a layer computes anew in every forward (parametrizations) have none.
    """
    model = getattr(model, "_orig_mod", model)
    found: dict[str, Site] = {}
    seen: set[int] = set()
    for path, layer in model.named_modules():
        for name, dim in _weights_of(layer).items():
            weight = layer._parameters.get(name)
            if weight is not None and id(weight) not in seen and weight.is_floating_point():
                seen.add(id(weight))
                full = f"{path}.{name}".removeprefix(".")
                found[full] = Site(full, layer, weight, dim)
    return found


def in_order(model: nn.Module, found: Mapping[str, Site], example: Example) -> list[str]:
    """The weights whose layers the forward calls, in the order of their first calls; with `model` in eval mode."""
    order: dict[str, None] = {}

    def note(stop: Stop) -> None:
        order.setdefault(stop.name)

    with kept_modes(model), torch.no_grad(), watched({name: site.layer for name, site in found.items()}, note):
        forward(model.eval(), example)
    return list(order)


@torch.no_grad()
def quantize_(
    model: nn.Module, schemes: Mapping[str, Scheme], pictures: Batches | None = None
) -> tuple[dict[str, Grid], list[str]]:
    """In place: put these weights on grids laid by their schemes, and remember them (see `on_grids`).

    pictures: unlabelled network inputs: weights are then rounded by GPTQ, where second moments of a layer's inputs are
    known, else to the nearest values. Returns the grids, and the weights that were rounded to the nearest.
    """
    found = {name: site for name, site in sites(model).items() if name in schemes}
    solvable = {name: site.layer for name, site in found.items() if pictures is not None and _has_moments(site)}
    moments = input_moments(model, solvable, pictures, MOST_ROWS) if pictures is not None and solvable else {}
    grids = {}
    for name, site in found.items():
        grids[name] = grid = grid_of(site.weight, schemes[name], site.dim)
        matrix = as_matrix(site.weight, site.dim)
        codes = gptq(grid, matrix, moments[name]) if name in moments else nearest(grid, matrix)
        site.weight.copy_(as_weight(values(grid, codes), site.weight, site.dim))
    remember_grids_(model, {**grids_of(model), **grids})
    return grids, [name for name in grids if name not in moments]


def grids_of(model: nn.Module) -> dict[str, Grid]:
    """The grids that a network remembers; its weights may have left them since (see `on_grids`)."""
    return getattr(getattr(model, "_orig_mod", model), GRIDS, {})


def remember_grids_(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    """In place: the network remembers exactly these grids."""
    setattr(getattr(model, "_orig_mod", model), GRIDS, dict(grids))


def on_grids(model: nn.Module) -> dict[str, tuple[Grid, Tensor]]:
    """{weight: (its grid, its codes (rows, columns) uint8)} of the weights that lie on their grids, bit for bit.

    A weight that was trained, folded or pruned since it was quantized is left out: it is stored as it is.
    """
    tensors = named_tensors(getattr(model, "_orig_mod", model))
    found = {}
    for name, grid in grids_of(model).items():
        weight = tensors.get(name)
        codes = None if weight is None else codes_on(moved(grid, weight.device), weight)
        if codes is not None:
            found[name] = grid, codes
    return found


def moved(grid: Grid, device: torch.device) -> Grid:
    """The grid on another device."""
    return Grid(grid.bits, grid.scale.to(device), grid.zero.to(device), grid.group, grid.dim)


def _weights_of(layer: nn.Module) -> dict[str, int]:
    """{weight of a layer: the dimension along which its outputs stand}"""
    if isinstance(layer, _ConvTransposeNd) or hasattr(layer, "nf"):  # nf: Conv1D of Hugging Face's GPT-2
        return {"weight": 1}
    if isinstance(layer, nn.MultiheadAttention):
        return dict.fromkeys(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), 0)
    return {"weight": 0} if isinstance(layer, (_ConvNd, nn.Linear, nn.Embedding)) else {}


def _has_moments(site: Site) -> bool:
    """Is a row of the weight one product with rows of inputs that calibration sees?"""
    dim = input_dim(site.layer)
    if isinstance(site.layer, _ConvNd):
        pointwise = max(site.layer.kernel_size) == 1
        return dim == 1 and (sees_patches(site.layer) or pointwise)
    return dim is not None
