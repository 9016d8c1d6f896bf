"""GPTQ (arXiv:2210.17323): each column is rounded in turn, and the columns after it make up for its error.

The rounded weight Q has a small Σ ‖(W - Q) x‖² over inputs x, which depends on them through H = Σ x xᵀ alone. With
U the upper Cholesky factor of H⁻¹ (section 3.3, step 3), rounding column i by e = (w_i - q_i) / U_ii changes each later
column j by -e U_ij (eq. 2-3). Columns of large H_ii go first, while there are many to make up for them.
"""

import torch
from torch import Tensor

from pipeline.compression.quantize.grids import Grid, spread

DAMPING = 0.01  # of the mean of H's diagonal, added to it (section 3.3)
BLOCK = 128  # columns after which those behind them are brought up to date, in one product (section 3.3, step 2)


def gptq(grid: Grid, matrix: Tensor, moments: Tensor) -> Tensor:
    """(rows, columns) uint8: codes of a weight for inputs of these second moments.

    matrix: (rows, columns), the weight; moments: (columns, columns), Σ x xᵀ up to a factor.
    """
    columns = matrix.shape[1]
    moments = moments.double()
    order = moments.diagonal().argsort(descending=True, stable=True)
    upper = _factor(moments[order][:, order])
    scale, zero = (t.double().expand(-1, columns)[:, order] for t in spread(grid, columns))
    left, codes = matrix.double()[:, order], torch.empty_like(matrix, dtype=torch.uint8)
    gone = left == 0  # weights that a mask removed make up for no error (SparseGPT, arXiv:2301.00774, section 3.5)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros(len(left), stop - start, dtype=left.dtype, device=left.device)
        for i in range(start, stop):
            code = ((left[:, i] / scale[:, i]).round() + zero[:, i]).clamp(0, 2**grid.bits - 1)
            code = torch.where(gone[:, i], zero[:, i], code)
            errors[:, i - start] = (left[:, i] - (code - zero[:, i]) * scale[:, i]) / upper[i, i]
            left[:, i + 1 : stop] -= errors[:, i - start, None] * upper[i, i + 1 : stop]
            codes[:, order[i]] = code.to(torch.uint8)
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of damped moments; an input that is never seen has no part in it."""
    diagonal = moments.diagonal()
    mean = diagonal.mean()
    damped = moments + torch.diag(DAMPING * mean + torch.where(diagonal > 0, 0.0, mean.clamp(min=1e-30)))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
