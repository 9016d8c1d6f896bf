"""An ONNX file as a module: ONNX Runtime computes its forward on the CPU, so that it is measured as any network is."""

from pipeline.export import onnx_run
from pipeline.finished import FileNetwork


class OnnxNetwork(FileNetwork):
    """A network that ONNX Runtime executes."""

    runtime, saved_as = "onnx", "an ONNX file"
    start = staticmethod(onnx_run)
