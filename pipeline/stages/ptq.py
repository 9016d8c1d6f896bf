"""Post-training quantization of weights and activations: an int8 network, which nothing but measuring may follow."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from pipeline.compression.calibrate.batches import Batches, batches_of, cut, samples
from pipeline.compression.calibrate.repair import is_norm
from pipeline.compression.copies import bare_copy
from pipeline.compression.plan import history, went_through_
from pipeline.compression.recipe import Calibration
from pipeline.compression.sizes.count import macs, parameters
from pipeline.cpu import saturates
from pipeline.example import Example, call_arguments
from pipeline.export import ONE_FILE, arrays_of, export_onnx, need_onnx, onnx_inputs, onnx_session, quiet
from pipeline.finished import FinishedNetwork
from pipeline.onnx_network import OnnxNetwork
from pipeline.openvino_network import OpenvinoNetwork, int8_openvino, need_openvino
from pipeline.stages.quantize import CALIBRATIONS
from pipeline.stages.stage import CALIBRATION, Seen, State, Supplies, Terms, spelled
from pipeline.tables import UserError, one_line, pick
from pipeline.torchao_network import ACTIVATIONS, TorchaoNetwork, by_pt2e, by_tensors, need_torchao

# How the range of an activation follows from its values on the calibration pictures: ONNX Runtime's calibrator, and its
# options. minmax: least and greatest; average: a moving average of those of each batch; percentile: without the
# outermost 0.001%; entropy: the cut that changes its histogram least (Kullback-Leibler, arXiv:2004.09602, section 4).
RANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "minmax": ("MinMax", {}),
    "average": ("MinMax", {"CalibMovingAverage": True}),
    "percentile": ("Percentile", {}),
    "entropy": ("Entropy", {}),
}
# Operations of ONNX that can have a weight; a product of matrices has none where both are activations.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PRODUCTS = ("Gemm", "MatMul")
BATCH = 32  # samples in a calibration batch: every activation of a batch is in memory at once


@dataclass(frozen=True)
class Ptq:
    """An int8 network: 8-bit weights with a scale for each output, and 8-bit activations. backend: a row of BACKENDS.

    onnx: a file for ONNX Runtime (QDQ: scales between operations); of a network with LayerNorms or their like, the
        operations with weights alone (see `_weighted`)
    openvino: a file for OpenVINO, by NNCF, which leaves the sums and norms of transformers floats, too
    pt2e: a program of torchao for torch.compile, of convolutions and linear layers
    torchao: linear layers alone, also for torch.compile; activations are rounded anew for each row of each batch, or
        stay numbers (activations=float)

    Weights (pt2e: activations) have 7 bits where this CPU cannot add up products of 8 (see `cpu.saturates`).

    calibrate: the pictures on which activations show their ranges: data or synthetic (made from the checkpoint); 512.
    range: a row of RANGES, of onnx alone.
    """

    calibrate: str = "data"
    range: str = "minmax"
    backend: str = "onnx"
    activations: str = "int8"

    def __post_init__(self) -> None:
        pick("calibrate", CALIBRATIONS, self.calibrate)
        pick("range", RANGES, self.range)
        pick("activations", dict.fromkeys(ACTIVATIONS), self.activations)
        known = pick("backend", BACKENDS, self.backend).options
        for option in ("calibrate", "range", "activations"):
            value = getattr(self, option)
            if option not in known and value != getattr(Ptq, option):
                raise UserError(f"ptq: {option}={value} is no option of backend={self.backend}; leave it out")

    def __str__(self) -> str:
        return spelled("ptq", self)

    @property
    def version(self) -> int:
        """1 quantized everything in a transformer, too; 3 has 7 bits, so that no file is taken for another CPU's.

        4 and 5 are those behind 512 synthetic pictures, which were 128.
        """
        return (3 if saturates() else 2) + 2 * (self.calibrate == "synthetic")

    @property
    def terms(self) -> Terms:
        return Terms(frozenset({"float", "grid"}), leaves=BACKENDS[self.backend].leaves)

    @property
    def calibrates(self) -> bool:
        return "calibrate" in BACKENDS[self.backend].options

    @property
    def needs(self) -> frozenset[str]:
        return CALIBRATIONS[self.calibrate] if self.calibrates else frozenset()

    @property
    def facts(self) -> MappingProxyType[str, str]:
        return MappingProxyType({"calibration": self.calibrate} if self.calibrates else {})

    def reason_against(self, model: nn.Module) -> str:
        try:
            BACKENDS[self.backend].need()
        except UserError as missing:
            return str(missing)
        return ""

    def seen(self, supplies: Supplies) -> Seen:
        return Seen(min(CALIBRATION, supplies.samples) if self.needs else 0)

    def run(self, state: State, supplies: Supplies) -> State:
        model, example = state.model, supplies.example
        pictures = supplies.pictures(Calibration(self.calibrate)) if self.calibrates else None
        sizes = parameters(model), macs(model, example, supplies.traces.counted)
        made = BACKENDS[self.backend].make(self, model, example, pictures, sizes)
        went_through_(made, history(model))
        return replace(state, model=made.eval())


def _onnx(stage: Ptq, model: nn.Module, example: Example, pictures: Any, sizes: tuple[int, int]) -> OnnxNetwork:
    content = int8_file(model, example, pictures, stage.range)
    return OnnxNetwork(content, bare_copy(model).eval(), example, *sizes)


def _openvino(stage: Ptq, model: nn.Module, example: Example, pictures: Any, sizes: tuple[int, int]) -> OpenvinoNetwork:
    content = int8_openvino(model, example, _cuts(batches_of(pictures)), normalizes(model))
    return OpenvinoNetwork(content, bare_copy(model).eval(), example, *sizes)


def _pt2e(stage: Ptq, model: nn.Module, example: Example, pictures: Any, sizes: tuple[int, int]) -> TorchaoNetwork:
    return TorchaoNetwork(*by_pt2e(model, example, batches_of(pictures)), *sizes)


def _torchao(stage: Ptq, model: nn.Module, example: Example, pictures: Any, sizes: tuple[int, int]) -> TorchaoNetwork:
    return TorchaoNetwork(*by_tensors(model, stage.activations), *sizes)


class Backend(NamedTuple):
    """Who quantizes. make: (stage, network, example, pictures or None, (parameters, MACs)) -> the int8 network.

    options: of Ptq, those that it takes. leaves: of stage.FORMS. need: raises UserError where a library is missing.
    """

    make: Callable[[Ptq, nn.Module, Example, Any, tuple[int, int]], FinishedNetwork]
    options: frozenset[str]
    leaves: str
    need: Callable[[], None]


BACKENDS = {
    "onnx": Backend(_onnx, frozenset({"calibrate", "range"}), "file", need_onnx),
    "openvino": Backend(_openvino, frozenset({"calibrate"}), "openvino", need_openvino),
    "pt2e": Backend(_pt2e, frozenset({"calibrate"}), "program", need_torchao),
    "torchao": Backend(_torchao, frozenset({"activations"}), "program", need_torchao),
}


def int8_file(model: nn.Module, example: Example, pictures: Example | Iterable[Example], ranges: str) -> bytes:
    """The ONNX file of a network in int8. ranges: a row of RANGES; pictures: see `batches_of`.

    UserError without ONNX's libraries, and for a network that cannot be written, does not fit into one file, or has
    nothing that could be quantized.
    """
    need_onnx()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > ONE_FILE:
        raise UserError(f"ptq writes one file of at most 2 GB, and {type(model).__name__} has {size / 1e9:.1f} GB")
    with tempfile.TemporaryDirectory() as folder:
        floats, ready, int8 = (Path(folder) / f"{name}.onnx" for name in ("floats", "ready", "int8"))
        export_onnx(model, example, floats)
        with quiet():
            try:
                _quantize(floats, ready, int8, batches_of(pictures), ranges, normalizes(model))
            except Exception as error:  # its libraries raise errors of any type
                raise UserError(f"{type(model).__name__} cannot be quantized for ONNX: {one_line(error)}") from error
            found = _slim(int8)
        if found is None:
            raise UserError(f"{type(model).__name__} has nothing that ONNX Runtime computes in int8; leave ptq out")
        return found


def normalizes(model: nn.Module) -> bool:
    """Does the network attend, or normalize each sample by its own numbers (LayerNorm, RMSNorm, GroupNorm)?

    The module is asked, because the same norm is one operation or ten in an ONNX file, by who wrote it.
    """
    return any(
        isinstance(module, nn.MultiheadAttention) or (is_norm(module) and getattr(module, "running_mean", None) is None)
        for module in model.modules()
    )


def _quantize(floats: Path, ready: Path, int8: Path, pictures: Batches, ranges: str, weighted: bool) -> None:
    """Write `int8`; ready: a file in between, where BatchNorm is part of the convolutions and shapes are known.

    weighted: quantize operations with weights alone; see `_weighted`.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    method, options = RANGES[ranges]
    try:
        quant_pre_process(floats, ready)
    except Exception:  # of any type: its symbolic shapes do not know every operation, such as a pooling over all places
        quant_pre_process(floats, ready, skip_symbolic_shape=True)
    session = onnx_session(ready)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = (onnx_inputs(session, arrays_of(call_arguments(part))) for part in _cuts(pictures))

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    quantize_static(
        ready,
        int8,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        reduce_range=saturates(),  # weights of 7 bits
        **(_weighted(ready, options) if weighted else {"extra_options": options}),
    )


def _weighted(ready: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `quantize_static` by which operations with a weight are quantized, and nothing in between.

    The sum that runs along the blocks of a transformer has channels that are far larger than the rest, so that one
    range for all leaves the others few steps (arXiv:2109.12948, section 3). Sums, norms, softmax and products of two
    activations stay numbers, and products with a weight, whose kernels sum in int32, write numbers, too. A ViT of five
    blocks on CIFAR-10 (5,000 test pictures) is 1.3% off in its logits so, 3.6% with all quantized, and faster.
    """
    import onnx

    graph = onnx.load(ready).graph
    stored = {one.name for one in graph.initializer}
    return {
        "op_types_to_quantize": list(WEIGHTED),
        "nodes_to_exclude": [n.name for n in graph.node if n.op_type in PRODUCTS and n.input[1] not in stored],
        "extra_options": {**options, "OpTypesToExcludeOutputQuantization": list(PRODUCTS)},
    }


def _cuts(pictures: Batches) -> Iterator[Example]:
    """Batches of at most BATCH samples."""
    for batch in pictures:
        for start in range(0, samples(batch), BATCH):
            yield cut(batch, start, start + BATCH)


def _slim(path: Path) -> bytes | None:
    """The file without where in the source each operation came from; None where it has no weight of 8 bits."""
    import onnx

    file = onnx.load(path)
    for one in (*file.graph.node, *file.graph.value_info):
        del one.metadata_props[:]
        one.ClearField("doc_string")
    del file.metadata_props[:]
    int8 = any(one.data_type == onnx.TensorProto.INT8 for one in file.graph.initializer)
    return file.SerializeToString() if int8 else None
