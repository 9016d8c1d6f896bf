"""Codes of b bits side by side in bytes: code i has the bits i b to (i + 1) b - 1, the lowest of each byte first."""

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 2**20  # codes that are packed together, a multiple of 8, so that every part fills its bytes


def packed(codes: Tensor, bits: int) -> Tensor:
    """(ceil(n bits / 8),) uint8: n codes below 2^bits, of any shape, uint8."""
    parts = codes.detach().cpu().reshape(-1).split(AT_ONCE)
    found = [np.packbits(_bits(part.numpy())[:, :bits], bitorder="little") for part in parts]
    return torch.from_numpy(np.concatenate(found))


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `packed`: (count,) uint8."""
    found = []
    for part in packed.split(AT_ONCE * bits // 8):
        places = np.unpackbits(part.numpy(), bitorder="little")
        each = places[: len(places) // bits * bits].reshape(-1, bits)
        found.append(np.packbits(each, axis=1, bitorder="little").reshape(-1))
    return torch.from_numpy(np.concatenate(found)[:count])


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many packed codes."""
    return -(-count * bits // 8)


def _bits(codes: np.ndarray) -> np.ndarray:
    """(n, 8): the bits of each code, the lowest first."""
    return np.unpackbits(codes[:, None], axis=1, bitorder="little")
