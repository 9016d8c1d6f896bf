"""Grids: evenly spaced values that a weight may have, so that it is stored as a whole number of a few bits.

A weight is seen as a matrix (rows, columns): a row is an output channel, a column an input (or an input and a tap).
A grid of b bits over the range lo <= 0 <= hi has (arXiv:1712.05877, eq. 1; arXiv:2106.08295, section 2.2)

    scale = (hi - lo) / (2^b - 1),   zero = round(-lo / scale),   value = (code - zero) scale,   0 <= code < 2^b

so 0 is always one of its values, and a weight between lo and hi moves by half a scale at most. A symmetric grid has the
range ±max|w|, an affine one that of the weights and 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.tables import UserError, pick

BITS = range(2, 9)
SHRUNK = torch.linspace(1.0, 0.2, 81)  # fractions of the whole range that least squares tries
PER = ("channel", "tensor", "group")  # what has a scale of its own: each row, the weight, `group` columns of a row

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scheme:
    """How grids are laid. per: one of PER; group: columns that share a scale; kind, fit: rows of KINDS and FITS.

    UserError for an option that is not there.
    """

    bits: int = 8
    per: str = "channel"
    group: int = 64
    kind: str = "affine"
    fit: str = "mse"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"bits {self.bits} must be a whole number from {BITS[0]} to {BITS[-1]}")
        if not isinstance(self.group, int) or self.group < 1:
            raise UserError(f"group {self.group} must be a whole number of at least 1")
        pick("per", dict.fromkeys(PER), self.per)
        pick("grid", KINDS, self.kind)
        pick("range", FITS, self.fit)


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of one weight. dim: of the weight, along which its rows stand; group: columns that share a scale.

    scale: (rows or 1, groups) float32, or float64 for a weight of this format; zero: uint8 of the same shape.
    """

    bits: int
    scale: Tensor
    zero: Tensor
    group: int
    dim: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Grid":
        """The grid itself: it never changes, so copies of a network share it."""
        return self


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """A weight as (rows, columns)."""
    return weight.movedim(dim, 0).flatten(1)


def as_weight(matrix: Tensor, like: Tensor, dim: int) -> Tensor:
    """The inverse of `as_matrix`: in the shape and the number format of `like`."""
    return matrix.to(like.dtype).view(like.movedim(dim, 0).shape).movedim(0, dim)


def grid_of(weight: Tensor, scheme: Scheme, dim: int = 0) -> Grid:
    """The grid that a scheme lays for a weight, whose rows stand along `dim`."""
    matrix = as_matrix(weight.detach(), dim)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    rows, columns = (matrix.reshape(1, -1) if scheme.per == "tensor" else matrix).shape
    group = min(scheme.group, columns) if scheme.per == "group" else columns
    # Columns that the last group lacks are zeros: the range holds 0 and its error is 0, so that nothing changes.
    parts = torch.nn.functional.pad(matrix.reshape(rows, columns), (0, -columns % group)).unflatten(1, (-1, group))
    whole = KINDS[scheme.kind](parts)
    scale, zero = _spaced(*FITS[scheme.fit](parts, whole, scheme.bits), scheme.bits)
    # The group of a whole tensor is each row's whole length, for the same scale is spread over all rows.
    return Grid(scheme.bits, scale, zero, matrix.shape[1] if scheme.per == "tensor" else group, dim)


def nearest(grid: Grid, matrix: Tensor) -> Tensor:
    """(rows, columns) uint8: the codes of the grid's values nearest to these, (rows, columns)."""
    scale, zero = spread(grid, matrix.shape[1])
    return ((matrix.to(scale.dtype) / scale).round() + zero).clamp(0, 2**grid.bits - 1).to(torch.uint8)


def values(grid: Grid, codes: Tensor) -> Tensor:
    """The values of these codes, (rows, columns), in the grid's number format."""
    scale, zero = spread(grid, codes.shape[1])
    return (codes.to(scale.dtype) - zero) * scale


def spread(grid: Grid, columns: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of every column, (rows or 1, columns or 1) each, in the number format of the scale."""
    pair = grid.scale, grid.zero.to(grid.scale.dtype)
    if grid.group >= columns:
        return pair
    of_column = torch.arange(columns, device=grid.scale.device) // grid.group
    return pair[0][:, of_column], pair[1][:, of_column]


def codes_on(grid: Grid, weight: Tensor) -> Tensor | None:
    """The codes of a weight that lies on its grid, bit for bit; None where it does not."""
    if weight.dim() <= grid.dim or not weight.is_floating_point():
        return None
    matrix = as_matrix(weight.detach(), grid.dim)
    if grid.scale.shape[0] not in (1, len(matrix)) or grid.scale.shape[1] != -(-matrix.shape[1] // grid.group):
        return None
    codes = nearest(grid, matrix)
    return codes if torch.equal(as_weight(values(grid, codes), weight, grid.dim), weight) else None


def _affine(parts: Tensor) -> Range:
    return parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)


def _symmetric(parts: Tensor) -> Range:
    largest = parts.abs().amax(-1)
    return -largest, largest


def _minmax(parts: Tensor, whole: Range, bits: int) -> Range:
    return whole


def _least_squares(parts: Tensor, whole: Range, bits: int) -> Range:
    """Of the SHRUNK ranges, the one with the least squared error of its weights: clipping few helps all others."""
    best, (lo, hi) = torch.full_like(whole[0], torch.inf), whole
    for factor in SHRUNK.tolist():
        error = _error(parts, whole[0] * factor, whole[1] * factor, bits)
        better = error < best
        best = torch.where(better, error, best)
        lo, hi = torch.where(better, whole[0] * factor, lo), torch.where(better, whole[1] * factor, hi)
    return lo, hi


def _error(parts: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """(rows, groups): the squared error of rounding parts (rows, groups, columns) to the grids of these ranges."""
    scale, zero = (t.unsqueeze(-1) for t in _spaced(lo, hi, bits))
    steps = (parts / scale).round_().clamp_(-zero.to(scale.dtype), (2**bits - 1 - zero.to(scale.dtype)))
    return (steps * scale - parts).square_().sum(-1)


def _spaced(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the ranges; weights that are all zero get the scale 1."""
    scale = (hi - lo) / (2**bits - 1)
    scale = torch.where(hi > lo, scale.clamp(min=torch.finfo(scale.dtype).tiny), 1.0)
    return scale, (-lo / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)


KINDS: dict[str, Callable[[Tensor], Range]] = {"affine": _affine, "symmetric": _symmetric}
FITS: dict[str, Callable[[Tensor, Range, int], Range]] = {"mse": _least_squares, "minmax": _minmax}
