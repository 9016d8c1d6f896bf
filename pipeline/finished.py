"""Networks that are a finished file: they are measured as any network is, and nothing may change them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.tables import UserError


class FinishedNetwork(nn.Module):
    """A network that is a file. content: (bytes,) uint8, the file, its only tensor, which sizes go by.

    params, macs: of the network that the file was made of, macs for one sample. It has no weights to be trained,
    compressed or repaired, and its copies share no tensor.
    runtime: the row of latency.RUNTIMES that it is made for. saved_as: what the file is.
    """

    content: Tensor
    runtime: str
    saved_as: str
    saved_by = "write its file with .write(path), or save the network in front of the stage that finished it"

    def __init__(self, content: bytes, params: int, macs: int) -> None:
        super().__init__()
        self.register_buffer("content", torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.params, self.macs = params, macs

    def write(self, path: str | Path) -> None:
        """Write the file."""
        Path(path).write_bytes(self.content.cpu().numpy().tobytes())

    def extra_repr(self) -> str:
        return f"{len(self.content):,} bytes"


def check_runtime(network: nn.Module, runtime: str) -> None:
    """Raise UserError for a finished network that is made for another runtime."""
    if isinstance(network, FinishedNetwork) and network.runtime != runtime:
        raise UserError(f"the network is {network.saved_as}; choose the runtime {network.runtime}")
