"""Lightning callbacks: when something is measured, never how."""

from callbacks.compression import CompressionCallback

__all__ = ["CompressionCallback"]
