"""An OpenVINO network as a module: OpenVINO computes its forward on the CPU, and NNCF makes it int8.

OpenVINO keeps a network as two files. Here they are one, a ZIP of network.xml, deflated because it is text, and
network.bin, as it is; unpacked, they are what openvino.Core().compile_model("network.xml") reads.
"""

import logging
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.compression.copies import bare_copy
from pipeline.cpu import saturates
from pipeline.example import Example, call_arguments
from pipeline.export import ArrayRun, Frame, arrays_of, need, of_tensors, program_of, quiet, written
from pipeline.finished import FileNetwork
from pipeline.tables import UserError, one_line

PARTS = {"network.xml": zipfile.ZIP_DEFLATED, "network.bin": zipfile.ZIP_STORED}


def need_openvino() -> None:
    """Raise UserError where a library that OpenVINO needs is missing."""
    need("OpenVINO", ("openvino", "nncf"), "openvino")


def libraries() -> tuple[Any, Any]:
    """(openvino, nncf), which both report their use to their makers by a third package, unless it cannot be imported.

    NNCF is imported inside of `quiet`, so that its logger writes to no screen; the class of all loggers stays theirs.
    """
    need_openvino()
    sys.modules.setdefault("openvino_telemetry", None)
    loggers = logging.getLoggerClass()
    with quiet():
        import nncf
        import openvino
    logging.setLoggerClass(loggers)
    return openvino, nncf


def export_openvino(model: nn.Module, example: Example, path: str | Path) -> float:
    """Write `model` in eval mode for OpenVINO, for batches of any size, and check it on the CPU.

    example, result and errors are those of `export.export_onnx`.
    """
    network, (openvino, _) = bare_copy(model).cpu().eval(), libraries()

    def write(file: Path) -> None:
        tensors = tuple(leaf for leaf in tree_leaves(call_arguments(example)) if isinstance(leaf, Tensor))
        program = program_of(OfTensors(network, example), tensors)
        file.write_bytes(packed(openvino, converted(openvino, program)))

    return written(network, example, Path(path), "OpenVINO", write, lambda file: of_tensors(openvino_run(file)))


class OfTensors(nn.Module):
    """A network whose arguments and outputs are tensors alone, because OpenVINO converts no flags and no None."""

    def __init__(self, network: nn.Module, example: Example) -> None:
        super().__init__()
        self.network, self.arguments = network, Frame(call_arguments(example))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.arguments.around(tensors)
        return tuple(leaf for leaf in tree_leaves(self.network(*args, **kwargs)) if isinstance(leaf, Tensor))


def converted(openvino: Any, program: torch.export.ExportedProgram) -> Any:
    """The openvino.Model of a program. UserError with the operations that OpenVINO does not know."""
    try:
        return openvino.convert_model(program)
    except Exception as error:  # of any type; its first line names a place in OpenVINO's source
        lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()] or [one_line(error)]
        raise UserError(next((line for line in lines if "No conversion rule" in line), lines[-1])) from error


def packed(openvino: Any, network: Any) -> bytes:
    """The file of an openvino.Model."""
    with tempfile.TemporaryDirectory() as folder, BytesIO() as content:
        openvino.save_model(network, Path(folder) / "network.xml", compress_to_fp16=False)
        with zipfile.ZipFile(content, "w") as file:
            for name, how in PARTS.items():
                file.writestr(zipfile.ZipInfo(name), (Path(folder) / name).read_bytes(), how)
        return content.getvalue()


def unpacked(openvino: Any, content: Path | bytes) -> Any:
    """The openvino.Model of a file or its content."""
    with zipfile.ZipFile(content if isinstance(content, Path) else BytesIO(content)) as file:
        return openvino.Core().read_model(*map(file.read, PARTS))


def openvino_run(content: Path | bytes) -> ArrayRun:
    """What OpenVINO makes of a file or its content: on the CPU, with as many threads as torch has.

    Floats stay of 32 bits, where OpenVINO would choose fewer on some processors, and threads may move between cores, as
    several processes would else be bound to the same ones.
    """
    openvino, _ = libraries()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,
    }
    network = openvino.Core().compile_model(unpacked(openvino, content), "CPU", options)
    return lambda arrays: network(arrays).to_tuple()


def int8_openvino(model: nn.Module, example: Example, pictures: Iterable[Example], attends: bool) -> bytes:
    """The OpenVINO file of a network in int8, by NNCF. pictures: calibration batches; attends: see ptq.normalizes.

    Ranges of activations are the means of those of the batches. NNCF's fast correction of biases is left out, because
    it puts logits further off: 5.3 in place of 2.7% on ResNet-20, 7.2 in place of 3.1% on ResNet-32 (512 training
    pictures of CIFAR-10 to calibrate, 2,000 others). Where a network attends, sums, norms and softmax stay floats;
    products of two activations do not: as floats they put a ViT's logits 1.40 in place of 1.42% off, and are slower.

    UserError without OpenVINO's libraries, and for a network that cannot be written or has nothing to be quantized.
    """
    openvino, nncf = libraries()
    with tempfile.TemporaryDirectory() as folder:
        export_openvino(model, example, Path(folder) / "floats")
        floats = unpacked(openvino, Path(folder) / "floats")
    fix = nncf.OverflowFix.ENABLE if saturates() else None  # weights of 7 bits
    seen = [arrays_of(call_arguments(batch)) for batch in pictures]
    with quiet():
        try:
            made = nncf.quantize(
                floats,
                nncf.Dataset(seen),
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(seen),
                model_type=nncf.ModelType.TRANSFORMER if attends else None,
                advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True, overflow_fix=fix),
            )
        except Exception as error:  # its libraries raise errors of any type
            raise UserError(f"{type(model).__name__} cannot be quantized for OpenVINO: {one_line(error)}") from error
    if not any(one.get_type_name() == "FakeQuantize" for one in made.get_ops()):
        raise UserError(f"{type(model).__name__} has nothing that OpenVINO computes in int8; leave ptq out")
    return packed(openvino, made)


class OpenvinoNetwork(FileNetwork):
    """A network that OpenVINO executes."""

    runtime, saved_as = "openvino", "an OpenVINO file"
    start = staticmethod(openvino_run)
