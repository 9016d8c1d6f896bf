"""Int8 networks by NNCF for OpenVINO: one file, read again without pickle, silent, and measured as networks are."""

import copy
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from chains_to_kill import ground, rows_of
from test_ptq import BATCHES, PICTURES, TASK, Attends, OwnRMSNorm, Residual, followed, net, tokens, transformer
from torch import nn

from pipeline.chains import OPENVINO, ready, state_of
from pipeline.compression.checkpoint import save_compressed, stored_size
from pipeline.compression.copies import bare_copy
from pipeline.compression.plan import history
from pipeline.compression.sizes.count import macs, parameters
from pipeline.evaluate import metrics_of
from pipeline.latency import profile
from pipeline.openvino_network import (
    PARTS,
    OpenvinoNetwork,
    export_openvino,
    int8_openvino,
    libraries,
    unpacked,
)
from pipeline.stages import Followed, State, Supplies, parse_chain, parse_tail
from pipeline.tables import UserError
from scripts.chain import timing_options

STAGE = "ptq(backend=openvino)"
TIMING = {"seconds": 0.0, "kind": "pictures", "sweeping": False}
there = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("openvino", "nncf")), reason="foldability[openvino] is not installed"
)


@pytest.fixture(scope="module")
def quantized() -> tuple[nn.Module, nn.Module]:
    """(the network, its int8 file as a module)"""
    dense = net()
    with torch.no_grad():
        return dense, followed(dense).state(parse_chain(STAGE)).model


def model_in(content: bytes):
    return unpacked(libraries()[0], content)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@there
def test_the_file_computes_nearly_what_the_network_does_for_any_batch(quantized):
    dense, file = quantized
    with torch.no_grad():
        expected, found = dense(PICTURES), file(PICTURES)
    assert 0 < off(found, expected) < 0.05
    for size in (1, 5):
        torch.testing.assert_close(file(PICTURES[:size]), found[:size], rtol=0.05, atol=0.05)
    assert torch.equal(file(PICTURES), found)
    torch.testing.assert_close(file(PICTURES.to(memory_format=torch.channels_last)), found)


@there
@pytest.mark.parametrize(("saturates", "second"), [(False, 127), (True, 63)])
def test_weights_are_the_nearest_steps_with_a_scale_for_each_output(saturates, second, monkeypatch):
    """±127 steps to the largest of a channel; of the first layer, and where a CPU sums in 16 bits of all, ±63."""
    monkeypatch.setattr("pipeline.openvino_network.saturates", lambda: saturates)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3, bias=False)).eval()
    found = model_in(int8_openvino(layers, PICTURES[:1], PICTURES.split(16), False))
    numbers = [one.get_data() for one in found.get_ops() if one.get_type_name() == "Constant"]
    for layer, steps in zip(layers, (63, second), strict=True):
        weight = layer.weight.detach().numpy()
        (codes,) = (value for value in numbers if value.dtype == np.int8 and value.shape == weight.shape)
        (scales,) = (value for value in numbers if value.shape == (len(weight), 1, 1, 1))
        assert scales.ravel() == pytest.approx(abs(weight).max((1, 2, 3)) / steps, rel=0.02)
        assert (abs(codes * scales - weight) <= 0.501 * scales).all()


@there
def test_it_is_evaluated_copied_written_and_timed_as_a_network_is(quantized, tmp_path):
    dense, file = quantized
    assert metrics_of(file, TASK, BATCHES)["loss"] == pytest.approx(metrics_of(dense, TASK, BATCHES)["loss"], abs=0.05)
    for twin in (copy.deepcopy(file), bare_copy(file)):
        assert torch.equal(twin(PICTURES), file(PICTURES))
        assert twin.content is not file.content
    assert [str(step) for step in history(bare_copy(file))] == [STAGE]
    file.write(tmp_path / "net.zip")
    assert (tmp_path / "net.zip").stat().st_size == stored_size(file) == len(file.content)
    *others, own = profile(file, PICTURES[:1], [1], ["eager", "compiled", "onnx", "openvino"], 0.01, beside=dense)
    assert {one.reason for one in others} == {"the network is an OpenVINO file; choose the runtime openvino"}
    assert (own.reason, own.memory) == ("", None)
    assert own.median > 0
    assert own.speedup > 0
    assert (own.params, own.macs, own.size) == (parameters(dense), macs(dense, PICTURES[:1]), stored_size(file))
    with pytest.raises(UserError, match="is a finished file and has no weights to save"):
        save_compressed(file, tmp_path / "net.safetensors")


@there
def test_floats_are_timed_too_and_files_for_another_runtime_are_not():
    found = profile(net(), PICTURES[:1], [1, 3], ["openvino"], seconds=0.01)
    assert [(one.batch_size, one.reason, one.memory) for one in found] == [(1, "", None), (3, "", None)]
    with torch.no_grad():
        onnx = followed(net()).state(parse_chain("ptq")).model
    (refused,) = profile(onnx, PICTURES[:1], [1], ["openvino"], seconds=0.01)
    assert refused.reason == "the network is an ONNX file; choose the runtime onnx"


@there
def test_the_file_unpacks_into_what_openvino_itself_reads_and_computes_the_same_when_it_is_made_again(
    quantized, tmp_path
):
    dense, file = quantized
    with torch.no_grad():
        assert torch.equal(followed(dense).state(parse_chain(STAGE)).model(PICTURES), file(PICTURES))
    with zipfile.ZipFile(BytesIO(file.content.numpy().tobytes())) as packed:
        assert packed.namelist() == list(PARTS)
        packed.extractall(tmp_path)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    network = libraries()[0].Core().compile_model(tmp_path / "network.xml", "CPU", exact)
    assert torch.equal(torch.from_numpy(network([PICTURES.numpy()]).to_tuple()[0]), file(PICTURES))


@there
def test_a_chain_that_goes_on_reads_the_file_again_and_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch.export, "load", None)
    text = f"fold@0.5 > repair > {STAGE}"
    first = rows_of([text], ground(tmp_path))
    assert [row.status for row in first] == ["ok"] * 4, first
    monkeypatch.setattr("pipeline.stages.ptq.int8_openvino", None)
    again = ground(tmp_path)
    assert rows_of([text], again) == first
    found = state_of(parse_chain(text), again).model
    assert isinstance(found, OpenvinoNetwork)
    file = again.folder(parse_chain(text)) / OPENVINO
    assert found.content.numpy().tobytes() == file.read_bytes()
    assert first[-1].bytes == file.stat().st_size
    assert [str(step) for step in history(found)] == text.split(" > ")
    with torch.no_grad():
        assert 0 < off(found(PICTURES), state_of(parse_chain(text)[:-1], again).model(PICTURES)) < 0.1


@there
def test_synthetic_pictures_need_no_data():
    dense = net()
    (stage,) = parse_tail("ptq(backend=openvino,calibrate=synthetic)")
    assert (stage.needs, stage.facts) == (frozenset(), {"calibration": "synthetic"})
    with torch.no_grad():
        file = Followed(State(dense), Supplies(dense, PICTURES[:1], TASK)).state((stage,)).model
        assert off(file(PICTURES), dense(PICTURES)) < 0.2


MOVES = {"Broadcast", "Gather", "Reshape", "Transpose", "VariadicSplit"}  # compute nothing


def of_int8(content: bytes) -> Counter[str]:
    """The operations that take a number of 8 bits, by how many there are."""
    found = model_in(content).get_ops()
    makers = {one: [given.get_source_output().get_node().get_type_name() for given in one.inputs()] for one in found}
    return Counter(one.get_type_name() for one, by in makers.items() if "FakeQuantize" in by)


@there
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, OwnRMSNorm])
def test_of_a_transformer_products_are_quantized_and_sums_norms_and_softmax_are_not(norm):
    dense, x = transformer(norm), tokens()
    usual = [i for i in range(16) if i != 3]  # as large as each other
    with torch.no_grad():
        content, plain = (int8_openvino(dense, x[:1], [x], attends) for attends in (True, False))
        assert of_int8(content)["MatMul"] == 4
        assert not set(of_int8(content)) - MOVES - {"MatMul"}
        apart, together = (
            off(OpenvinoNetwork(one, dense, x[:1], 1, 1)(x)[..., usual], dense(x)[..., usual])
            for one in (content, plain)
        )
    assert apart < 0.01
    assert 10 * apart < together


@there
@pytest.mark.parametrize(
    ("build", "given", "wanted"),
    [
        (lambda: Residual(nn.BatchNorm2d(3)), PICTURES, {"Convolution", "Add"}),
        (lambda: Residual(nn.GroupNorm(1, 3)), PICTURES, {"Convolution"}),
        (Attends, torch.randn(8, 5, 16), {"MatMul"}),
    ],
    ids=["BatchNorm", "GroupNorm", "attention"],
)
def test_the_stage_asks_the_network_which_way_it_is_quantized(build, given, wanted):
    torch.manual_seed(0)
    dense = build().eval()
    supplies = Supplies(dense, given[:1], TASK, [(given, torch.zeros(len(given), dtype=torch.long))])
    with torch.no_grad():
        file = Followed(State(dense), supplies).state(parse_chain(STAGE)).model
    assert set(of_int8(file.content.numpy().tobytes())) - MOVES == wanted


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, scale, mask=None, doubled=True):
        return {"scores": self.layer(x) * scale * (1 + doubled), "pair": (self.layer(x), None), "kind": 3}


@there
def test_arguments_that_are_no_tensors_and_the_structure_of_outputs_are_kept():
    torch.manual_seed(0)
    dense, example = Flagged().eval(), {"scale": torch.rand(64, 1), "x": torch.randn(64, 6)}
    fixed = {"mask": None, "doubled": False}
    small = {**{name: tensor[:1] for name, tensor in example.items()}, **fixed}
    file = OpenvinoNetwork(int8_openvino(dense, small, [{**example, **fixed}], False), dense, small, 1, 1)
    found = file(**example, **fixed)
    assert (found["pair"][1], found["kind"]) == (None, 3)
    torch.testing.assert_close(found["scores"], found["pair"][0] * example["scale"], rtol=0.05, atol=0.05)
    with torch.no_grad():
        assert off(found["scores"], dense(**example, **fixed)["scores"]) < 0.05


class Bessel(nn.Linear):
    def forward(self, x):
        return torch.special.bessel_j0(super().forward(x))


@there
def test_what_openvino_cannot_do_is_one_line(tmp_path, capfd):
    with pytest.raises(UserError, match="ReLU has nothing that OpenVINO computes in int8; leave ptq out"):
        int8_openvino(nn.ReLU(), torch.randn(1, 3), [torch.randn(8, 3)], False)
    why = r"^Bessel as OpenVINO: No conversion rule found for operations: aten.special_bessel_j0.default$"
    with pytest.raises(UserError, match=why):
        export_openvino(Bessel(4, 4), torch.zeros(1, 4), tmp_path / "net.zip")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ptq(backend=openvino,range=entropy)", "ptq: range=entropy is no option of backend=openvino; leave it out"),
        ("ptq(backend=openvino,activations=float)", "activations=float is no option of backend=openvino"),
        *(
            (f"{STAGE} > {stage}", f"{stage} cannot follow.*the network is a finished file of OpenVINO")
            for stage in ("export", "ptq", "repair", "fold@0.5", "quantize", "tune")
        ),
    ],
)
def test_options_and_orders_that_cannot_work_are_refused(text, why):
    with pytest.raises(UserError, match=why):
        parse_chain(text)


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_a_library_that_is_missing_is_one_line_before_anything_is_done(missing, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.export.find_spec", lambda name: None if name == missing else True)
    line = f"OpenVINO needs {missing}: pip install 'foldability[openvino]'"
    assert parse_tail(STAGE)[0].reason_against(net()) == line
    for asked in (partial(profile, net(), PICTURES[:1], [1]), partial(timing_options, batch_sizes=[1], **TIMING)):
        with pytest.raises(UserError) as caught:
            asked(runtimes=["openvino"])
        assert str(caught.value) == line
    why = re.escape(f"{STAGE} cannot be done on Sequential: {line}; leave it out")
    with pytest.raises(UserError, match=why):
        ready([parse_chain(f"fold@0.5 > {STAGE}")], ground(tmp_path))
    assert not list(tmp_path.iterdir())


# As a user runs it: NNCF keeps quiet by itself where it sees pytest.
SILENT = """
import logging, socket, sys
import stage_nets, torch
from test_openvino import STAGE, followed, net, parse_chain, PICTURES, profile

del sys.modules["pytest"]
assert not {"openvino", "nncf"} & set(sys.modules)
def refused(*args, **options):
    raise AssertionError("a connection")
socket.socket.connect = socket.getaddrinfo = refused
loggers = logging.getLoggerClass()
with torch.no_grad():
    made = followed(net()).state(parse_chain(STAGE)).model
    profile(made, PICTURES[:1], [1], ["openvino"], 0.0)
    profile(net(), PICTURES[:1], [1], ["openvino"], 0.0)
assert {"openvino", "nncf"} <= set(sys.modules)
assert not [name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module]
assert logging.getLoggerClass() is loggers
"""


@there
def test_nothing_is_printed_sent_or_left_in_the_home_of_the_user(tmp_path):
    tests = Path(__file__).parent
    where = os.pathsep.join(map(str, (tests.parent, tests)))
    settings = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": where, "PYTHONDONTWRITEBYTECODE": "1"}
    settings.pop("CI", None)  # in which telemetry is off
    done = subprocess.run([sys.executable, "-W", "error", "-c", SILENT], env=settings, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "intel").exists()
