"""Products of a matrix with itself, which make up much of clustering and of calibration."""

from collections.abc import Iterable

import torch
from scipy.linalg.blas import dsyrk, ssyrk
from torch import Tensor

SYRK = {torch.float32: ssyrk, torch.float64: dsyrk}  # rank-k updates of one half of a symmetric matrix
BLOCK = 256  # rows and columns that fit in the cache
LOWER = torch.ones(BLOCK, BLOCK, dtype=torch.bool).tril()  # made once, because tril takes milliseconds


def gram_matrix(rows: Tensor) -> Tensor:
    """rows rowsᵀ, (n, n) of (n, m), on the device of the rows.

    On the CPU NumPy computes one half and copies it to the other, in half the time of torch's product. Numbers of 16
    bits go to torch: NumPy lacks bfloat16, and has no fast product of its float16.
    """
    if rows.device.type != "cpu" or rows.dtype not in SYRK:
        return rows @ rows.T
    given = rows.detach().numpy()
    return torch.from_numpy(given @ given.T)


def gram_total(blocks: Iterable[Tensor], size: int, dtype: torch.dtype, even: bool = False) -> Tensor:
    """The sum of the Gram matrices of blocks (size, F) of any widths F, (size, size) of `dtype` on the CPU.

    even: each block counts the same: its Gram matrix is divided by its trace, unless all of it is 0.

    On the CPU one half of the sum is added up in place, and copied to the other half once at the end. A GPU may round
    products of float32 to a few digits, so it gets float64.
    """
    half = torch.zeros(size, size, dtype=dtype)
    for rows in blocks:
        energy = float(torch.linalg.vector_norm(rows.detach(), dtype=torch.float64)) ** 2 if even else 1.0
        _add_gram_(half, rows.detach(), 1 / energy if energy > 0 else 1.0)
        del rows  # so that the next block finds its memory
    return mirrored_(half)


def _add_gram_(half: Tensor, rows: Tensor, share: float) -> None:
    """In place: add `share` times the Gram matrix of (size, F) to the lower half, at least, of (size, size)."""
    if rows.device.type != "cpu":
        half += share * gram_matrix(rows.double() if rows.is_cuda else rows).to("cpu", half.dtype)
        return
    given = rows.numpy()
    across = not given.flags.f_contiguous  # BLAS takes columns; rows are the columns of the transpose
    SYRK[half.dtype](share, given.T if across else given, 1.0, half.numpy().T, trans=across, overwrite_c=1)


def mirrored_(half: Tensor) -> Tensor:
    """In place: a symmetric matrix (n, n) of its lower half, by blocks of at most BLOCK."""
    for i in range(0, len(half), BLOCK):
        own = half[i : i + BLOCK, i : i + BLOCK]
        own.copy_(torch.where(LOWER[: len(own), : len(own)], own, own.T))
        half[i : i + BLOCK, i + BLOCK :] = half[i + BLOCK :, i : i + BLOCK].T
    return half
