"""Networks that are a finished file: they are measured as any network is, and nothing may change them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.example import Example, call_arguments
from pipeline.export import ArrayRun, Frame, arrays_of
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


class FileNetwork(FinishedNetwork):
    """A file that a runtime beside torch executes on the CPU. Outputs are where the first input is, without gradients.

    start: the file's content -> what the runtime makes of it.
    """

    start: Callable[[bytes], ArrayRun]

    def __init__(self, content: bytes, like: nn.Module, example: Example, params: int, macs: int) -> None:
        """like: the network that the file was made of, in eval mode, whose outputs' structure the file's are given."""
        super().__init__(content, params, macs)
        args, kwargs = call_arguments(example)
        with torch.no_grad():
            self._outputs = Frame(like(*args, **kwargs))
        self._run: ArrayRun | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return self._outputs.around(torch.from_numpy(one).to(device) for one in self.run(arrays_of((args, kwargs))))

    @property
    def run(self) -> ArrayRun:
        """Made when it is first asked for."""
        if self._run is None:
            self._run = type(self).start(self.content.cpu().numpy().tobytes())
        return self._run

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}  # a runtime's network cannot be copied; a copy makes its own


def check_runtime(network: nn.Module, runtime: str) -> None:
    """Raise UserError for a finished network that is made for another runtime."""
    if isinstance(network, FinishedNetwork) and network.runtime != runtime:
        raise UserError(f"the network is {network.saved_as}; choose the runtime {network.runtime}")
