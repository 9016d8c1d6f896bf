"""Post-training quantization of weights and activations: an int8 file for ONNX Runtime, which nothing may change."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from pipeline.compression.calibrate.batches import Batches, batches_of, cut, samples
from pipeline.compression.copies import bare_copy
from pipeline.compression.plan import history, went_through_
from pipeline.compression.recipe import Calibration
from pipeline.compression.sizes.count import macs, parameters
from pipeline.compression.trace.graph import Example
from pipeline.export import ONE_FILE, export_onnx, need_onnx, onnx_inputs, onnx_session, quiet
from pipeline.onnx_network import OnnxNetwork
from pipeline.stages.quantize import CALIBRATIONS
from pipeline.stages.stage import CALIBRATION, Seen, State, Supplies, Terms, spelled
from pipeline.tables import UserError, one_line, pick

# How the range of an activation follows from its values on the calibration pictures: ONNX Runtime's calibrator, and its
# options. minmax: least and greatest; average: a moving average of those of each batch; percentile: without the
# outermost 0.001%; entropy: the cut that changes its histogram least (Kullback-Leibler, arXiv:2004.09602, section 4).
RANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "minmax": ("MinMax", {}),
    "average": ("MinMax", {"CalibMovingAverage": True}),
    "percentile": ("Percentile", {}),
    "entropy": ("Entropy", {}),
}
BATCH = 32  # samples in a calibration batch: every activation of a batch is in memory at once


@dataclass(frozen=True)
class Ptq:
    """An ONNX file with 8-bit weights, a scale for each output, and 8-bit activations (QDQ: scales between operations).

    calibrate: the pictures on which activations show their ranges: data (512) or synthetic (128, from the checkpoint).
    range: a row of RANGES.
    """

    calibrate: str = "data"
    range: str = "minmax"

    terms = Terms(frozenset({"float", "grid"}), leaves="file")

    def __post_init__(self) -> None:
        pick("calibrate", CALIBRATIONS, self.calibrate)
        pick("range", RANGES, self.range)

    def __str__(self) -> str:
        return spelled("ptq", self)

    @property
    def needs(self) -> frozenset[str]:
        return CALIBRATIONS[self.calibrate]

    @property
    def facts(self) -> MappingProxyType[str, str]:
        return MappingProxyType({"calibration": self.calibrate})

    def reason_against(self, model: nn.Module) -> str:
        try:
            need_onnx()
        except UserError as missing:
            return str(missing)
        return ""

    def seen(self, supplies: Supplies) -> Seen:
        return Seen(min(CALIBRATION, supplies.samples) if self.needs else 0)

    def run(self, state: State, supplies: Supplies) -> State:
        pictures = supplies.pictures(Calibration(self.calibrate))
        content = int8_file(state.model, supplies.example, pictures, self.range)
        like = bare_copy(state.model).eval()
        sizes = parameters(like), macs(like, supplies.example, supplies.traces.counted)
        made = OnnxNetwork(content, like, supplies.example, *sizes)
        went_through_(made, history(state.model))
        return replace(state, model=made.eval())


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
                _quantize(floats, ready, int8, batches_of(pictures), ranges)
            except Exception as error:  # its libraries raise errors of any type
                raise UserError(f"{type(model).__name__} cannot be quantized for ONNX: {one_line(error)}") from error
            found = _slim(int8)
        if found is None:
            raise UserError(f"{type(model).__name__} has nothing that ONNX Runtime computes in int8; leave ptq out")
        return found


def _quantize(floats: Path, ready: Path, int8: Path, pictures: Batches, ranges: str) -> None:
    """Write `int8`; ready: a file in between, where BatchNorm is part of the convolutions and shapes are known."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    method, options = RANGES[ranges]
    quant_pre_process(floats, ready)
    session = onnx_session(ready)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = _feeds(session, pictures)

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
        extra_options=options,
    )


def _feeds(session: Any, pictures: Batches) -> Iterator[dict[str, Any]]:
    for batch in pictures:
        for start in range(0, samples(batch), BATCH):
            yield onnx_inputs(session, cut(batch, start, start + BATCH))


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
