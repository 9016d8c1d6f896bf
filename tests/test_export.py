"""Exported networks: the file alone gives the network's outputs for every batch; one that differs is never written."""

import importlib.util
import zipfile

import onnxruntime
import pytest
import torch
from torch import nn

from pipeline.compression import compress
from pipeline.export import batch_of, export_onnx, export_program
from pipeline.models import build_model
from pipeline.openvino_network import export_openvino
from pipeline.tables import UserError


def run_onnx(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def run_program(path, *inputs):
    found = torch.export.load(path).module()(*inputs)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def run_openvino(path, *inputs):
    import openvino  # behind the export, which keeps it from reporting that it is used

    with zipfile.ZipFile(path) as file:
        file.extractall(path.parent / "unpacked")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else of 16 bits where the processor has them
    network = openvino.Core().compile_model(path.parent / "unpacked" / "network.xml", "CPU", exact)
    return [torch.from_numpy(array) for array in network([tensor.numpy() for tensor in inputs]).to_tuple()]


THERE = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="foldability[openvino] is not installed"
)
FORMS = pytest.mark.parametrize(
    ("export", "run", "name"),
    [
        pytest.param(export_onnx, run_onnx, "net.onnx", id="onnx"),
        pytest.param(export_program, run_program, "net.pt2", id="program"),
        pytest.param(export_openvino, run_openvino, "net.zip", id="openvino", marks=THERE),
    ],
)


@pytest.fixture(scope="module")
def folded():
    """A folded ResNet18 of width 4, channels-last, in training mode."""
    torch.manual_seed(0)
    net = build_model("resnet18", 10, 3, width=4).to(memory_format=torch.channels_last)
    return compress(net, torch.zeros(1, 3, 8, 8), "fold", 0.5).model.train()


@FORMS
def test_the_file_computes_what_the_network_does(export, run, name, folded, tmp_path):
    before = {n: (t, t.clone()) for n, t in folded.state_dict(keep_vars=True).items()}
    difference = export(folded, torch.zeros(1, 3, 8, 8), tmp_path / "new" / name)
    assert 0 <= difference < 1e-5
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]
    assert folded.training
    assert all(t is before[n][0] and torch.equal(t, before[n][1]) for n, t in folded.state_dict(keep_vars=True).items())
    x = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "new" / name, x)[0], folded.eval()(x), rtol=1e-4, atol=1e-5)
    folded.train()


class Named(nn.Module):
    """Two inputs by name, one of them whole numbers, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, tokens, weight, normed=True):
        x = self.words(tokens) * weight[:, :, None]
        return self.head(x.softmax(-1) if normed else x), tokens > 3


@FORMS
def test_several_inputs_by_name_in_any_order(export, run, name, tmp_path):
    net = Named()
    tokens, weight = torch.tensor([[1, 8, 2]]), torch.ones(1, 3)
    export(net, {"weight": weight, "normed": False, "tokens": tokens}, tmp_path / name)
    tokens, weight = torch.randint(9, (4, 3)), torch.rand(4, 3)
    expected = net(tokens, weight, normed=False)
    if export is not export_program:
        found = run(tmp_path / name, weight, tokens)
    else:
        found = torch.export.load(tmp_path / name).module()(tokens=tokens, weight=weight, normed=False)
    torch.testing.assert_close(list(found), list(expected))


class Looked(nn.Linear):
    """Takes a table that is no batch, but has as many rows as the batch that is traced."""

    def forward(self, x, table):
        return super().forward(x) @ table.T


@FORMS
def test_an_input_that_is_no_batch(export, run, name, tmp_path):
    net, table = Looked(4, 4), torch.randn(2, 4)
    export(net, (torch.zeros(1, 4), table), tmp_path / name)
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(tmp_path / name, x, table)[0], net(x, table))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats(dtype, tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    example = torch.zeros(1, 6, dtype=dtype)
    export_program(net, example, tmp_path / "net.pt2")
    (found,) = run_program(tmp_path / "net.pt2", example)
    assert found.dtype == dtype
    assert torch.equal(found, net(example))


def test_a_sliced_example_does_not_take_the_whole_into_the_file(tmp_path):
    export_program(nn.Linear(8, 8), torch.zeros(100_000, 8)[:1], tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").stat().st_size < 50_000


class Fixed(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(2, -1))


class Looks(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class Draws(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.rand_like(x)


DIFFERS = r"differs from the network by \d\.\de[-+]\d\d for a batch of 1; rounding explains 1e-04"


@FORMS
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (Fixed, "Fixed cannot be written as .* for batches of any size: .*batch"),
        (Looks, "Looks cannot be written as .* for batches of any size: .*data-dependent"),
        (Draws, f"Draws as .*: ({DIFFERS}|No conversion rule found for operations: aten.rand_like.default)"),
    ],
)
def test_what_fails_leaves_the_file_before_and_makes_no_noise(export, run, name, build, match, tmp_path, capfd):
    (tmp_path / name).write_text("before")
    with pytest.raises(UserError, match=match) as caught:
        export(build(4, 4), torch.zeros(2, 4), tmp_path / name)
    assert "\n" not in str(caught.value)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "before")]
    assert capfd.readouterr() == ("", "")


def test_libraries_that_are_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("pipeline.export.find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(UserError, match=r"ONNX needs onnxscript: pip install 'foldability\[onnx\]'"):
        export_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "net.onnx")


def test_weights_beyond_protobufs_limit_go_into_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.export.ONE_FILE", 1000)
    net = nn.Linear(64, 64)
    export_onnx(net, torch.zeros(1, 64), tmp_path / "net.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    x = torch.randn(3, 64)
    torch.testing.assert_close(run_onnx(tmp_path / "net.onnx", x)[0], net(x))


def test_batches_are_rows_of_the_example_with_noise():
    example = {"x": torch.zeros(2, 3), "tokens": torch.tensor([4, 7]), "table": torch.arange(5.0), "flag": True}
    batch = batch_of(example, 5)
    assert list(batch) == list(example)
    assert batch["x"].shape == (5, 3)
    assert batch["x"].unique().numel() == 15
    assert batch["tokens"].tolist() == [4, 7, 4, 7, 4]
    assert torch.equal(batch["table"], example["table"])
    assert batch["table"].data_ptr() != example["table"].data_ptr()
    assert batch["flag"] is True
    assert torch.equal(batch["x"], batch_of(example, 5)["x"])
    small = batch_of(100 + torch.tensor([[1.0], [2.0]]), 400)
    assert 100 < small.mean() < 103
    assert (batch_of(torch.zeros(1, 2), 3).requires_grad, len(batch_of((torch.zeros(1, 2),), 3)[0])) == (False, 3)
    with pytest.raises(UserError, match="the example holds no tensor with a batch dimension"):
        batch_of({"flag": True}, 2)
