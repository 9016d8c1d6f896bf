"""Lightning callbacks: when something is measured, never how."""

from callbacks.compression import CompressionCallback
from callbacks.resume import EpochSeed

__all__ = ["CompressionCallback", "EpochSeed"]
