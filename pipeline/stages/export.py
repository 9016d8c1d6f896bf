"""A network as the file that it is used from: ONNX, which ONNX Runtime executes from here on."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from torch import nn

from pipeline.compression.plan import history, went_through_
from pipeline.compression.sizes.count import macs, parameters
from pipeline.export import ONE_FILE, export_onnx
from pipeline.onnx_network import OnnxNetwork
from pipeline.stages.ptq import Ptq
from pipeline.stages.stage import FORMS, Seen, State, Supplies, Terms
from pipeline.tables import UserError


@dataclass(frozen=True)
class Export:
    """The ONNX file of the network in its own number format; behind ptq the file is there, and stays as it is.

    What is measured behind this stage is the file.
    """

    needs = frozenset[str]()
    facts = MappingProxyType({})
    terms = Terms(frozenset(FORMS) - {"openvino", "program"}, leaves="file")

    def __str__(self) -> str:
        return "export"

    def reason_against(self, model: nn.Module) -> str:
        return Ptq().reason_against(model)

    def seen(self, supplies: Supplies) -> Seen:
        return Seen()

    def run(self, state: State, supplies: Supplies) -> State:
        model = state.model
        if isinstance(model, OnnxNetwork):
            return state
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        if size > ONE_FILE:
            raise UserError(
                f"export writes one file of at most 2 GB, and {type(model).__name__} has {size / 1e9:.1f} GB"
            )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            export_onnx(model, supplies.example, file)
            content = file.read_bytes()
        sizes = parameters(model), macs(model, supplies.example, supplies.traces.counted)
        made = OnnxNetwork(content, model, supplies.example, *sizes)
        went_through_(made, history(model))
        return replace(state, model=made.eval())
