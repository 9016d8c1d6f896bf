"""An ONNX file as a module: ONNX Runtime computes its forward on the CPU, so that it is measured as any network is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pipeline.example import Example, call_arguments
from pipeline.export import onnx_feed, onnx_session
from pipeline.finished import FinishedNetwork


class OnnxNetwork(FinishedNetwork):
    """A network that ONNX Runtime executes. Outputs are where the first input is, without gradients."""

    runtime, saved_as = "onnx", "an ONNX file"

    def __init__(self, content: bytes, like: nn.Module, example: Example, params: int, macs: int) -> None:
        """like: the network that the file was made of, in eval mode, whose outputs' structure the file's are given."""
        super().__init__(content, params, macs)
        args, kwargs = call_arguments(example)
        with torch.no_grad():
            leaves, self._structure = tree_flatten(like(*args, **kwargs))
        self._fixed = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self._session: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        feed, device = onnx_feed(self.session, (args, kwargs))
        found = iter([torch.from_numpy(array).to(device) for array in self.session.run(None, feed)])
        return tree_unflatten([next(found) if one is None else one[0] for one in self._fixed], self._structure)

    @property
    def session(self) -> Any:
        """The onnxruntime.InferenceSession, made when it is first asked for."""
        if self._session is None:
            self._session = onnx_session(self.content.cpu().numpy().tobytes())
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}  # sessions cannot be copied; a copy makes its own
