"""Products of a matrix with itself, which make up much of clustering and of calibration."""

import torch
from torch import Tensor


def gram_matrix(rows: Tensor) -> Tensor:
    """rows rowsᵀ, (n, n) of (n, m), on the device of the rows.

    On the CPU NumPy computes one half and copies it to the other, in half the time of torch's product. Numbers of 16
    bits go to torch: NumPy lacks bfloat16, and has no fast product of its float16.
    """
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
        return rows @ rows.T
    given = rows.detach().numpy()
    return torch.from_numpy(given @ given.T)
