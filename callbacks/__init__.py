"""Lightning callbacks: when something is compressed and measured, never how."""

from callbacks.compression import CompressionCallback
from callbacks.resume import EpochSeed
from callbacks.shrink import Shrink
from callbacks.throughput import Throughput

__all__ = ["CompressionCallback", "EpochSeed", "Shrink", "Throughput"]
