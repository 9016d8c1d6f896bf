"""Int8 networks by torchao: something was quantized, sizes are of what they compute with, and no pickle is read."""

import pytest
import safetensors.torch
import stage_nets
import torch
from chains_to_kill import ground, rows_of
from chains_to_kill import net as chain_net
from torch import nn

import pipeline.chains
from pipeline.chains import TORCHAO, network_of
from pipeline.compression.checkpoint import save_compressed, stored_size
from pipeline.compression.copies import bare_copy
from pipeline.compression.plan import history
from pipeline.evaluate import metrics_of
from pipeline.latency import profile
from pipeline.stages import Followed, State, Supplies, parse_chain, parse_tail, spell_chain
from pipeline.tables import UserError
from pipeline.tasks import Classification
from pipeline.torchao_network import TorchaoNetwork, by_pt2e, by_tensors

PICTURES = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 - 1
LABELS = torch.randint(4, (64,), generator=torch.Generator().manual_seed(0))
BATCHES = list(zip(PICTURES.split(32), LABELS.split(32), strict=True))
TASK = Classification("multiclass", "logits", classes=4)
BACKENDS = ["pt2e", "torchao", "torchao,activations=float"]


def net() -> nn.Module:
    return stage_nets.net(PICTURES)


def after(chain: str, dense: nn.Module) -> nn.Module:
    with torch.no_grad():
        return Followed(State(dense), Supplies(dense, PICTURES[:1], TASK, BATCHES)).state(parse_chain(chain)).model


@pytest.fixture(scope="module", params=BACKENDS)
def quantized(request) -> tuple[nn.Module, nn.Module]:
    """(the network, the same by torchao)"""
    dense = net()
    return dense, after(f"ptq(backend={request.param})", dense)


def int8_weights(network: nn.Module) -> list[torch.Size]:
    tensors = safetensors.torch.load(network.content.numpy().tobytes())
    return sorted(t.shape for t in tensors.values() if t.dtype == torch.int8 and t.dim() > 1 and t.shape[1] > 1)


def test_layers_were_quantized_and_answers_are_nearly_the_same(quantized):
    dense, small = quantized
    assert int8_weights(small) in ([(4, 8)], [(4, 8), (8, 3, 3, 3), (8, 8, 3, 3)])
    with torch.no_grad():
        expected, found = dense(PICTURES), small(PICTURES)
        assert 0 < (found - expected).norm() / expected.norm() < 0.05
        torch.testing.assert_close(small(PICTURES[:1]), found[:1], rtol=0.02, atol=0.02)  # another batch size


def test_it_is_measured_copied_and_written_as_a_network_is(quantized, tmp_path):
    dense, small = quantized
    assert metrics_of(small, TASK, BATCHES)["loss"] == pytest.approx(metrics_of(dense, TASK, BATCHES)["loss"], abs=0.05)
    twin = bare_copy(small)
    with torch.no_grad():
        assert torch.equal(twin(PICTURES), small(PICTURES))
    assert [step.stage.partition("(")[0] for step in history(twin)] == ["ptq"]
    small.write(tmp_path / "net")
    assert (tmp_path / "net").stat().st_size == stored_size(small)
    assert list(small.state_dict()) == ["content"]
    eager, onnx = profile(small, PICTURES[:1], [1], ["eager", "onnx"], seconds=0.01)
    assert eager.reason == onnx.reason == (
        "the network is quantized by torchao for torch.compile; choose the runtime compiled"
    )  # fmt: skip


def test_sizes_leave_the_dead_floats_out():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    program, tensors = by_pt2e(dense, torch.randn(1, 8, 8, 8), [torch.randn(8, 8, 8, 8)])
    weights = sum(p.numel() for p in dense.parameters() if p.dim() > 1)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert weights < size < 1.1 * weights
    assert sum(t.numel() * t.element_size() for t in program.state_dict().values()) > 4 * weights


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pt2e", "torchao"])
def test_it_is_timed_compiled(backend):
    dense = net()
    (found,) = profile(after(f"ptq(backend={backend})", dense), PICTURES[:1], [4], ["compiled"], 0.01, beside=dense)
    assert found.reason == ""
    assert found.speedup > 0


def test_a_chain_that_goes_on_makes_it_again_and_reads_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch.export, "load", None)
    chain = parse_chain("fold@0.5 > ptq(backend=torchao)")
    first = rows_of([spell_chain(chain)], ground(tmp_path))
    assert [row.status for row in first] == ["ok", "ok", "ok"], first
    again = ground(tmp_path)
    made = network_of(chain, again)
    assert isinstance(made, TorchaoNetwork)
    assert made.content.numpy().tobytes() == (again.folder(chain) / TORCHAO).read_bytes()
    assert first[-1].bytes == len(made.content)
    assert first[-1].params < sum(p.numel() for p in chain_net().parameters())


def test_pt2e_is_the_same_when_it_is_made_again():
    dense, one = net(), "ptq(backend=pt2e)"
    assert torch.equal(after(one, dense).content, after(one, dense).content)
    assert pipeline.chains.FILES[TorchaoNetwork] == TORCHAO


def test_channels_that_take_minutes_to_compile_are_refused_with_the_way_out():
    odd = nn.Sequential(nn.Conv2d(3, 11, 3), nn.Conv2d(11, 8, 3))
    with pytest.raises(UserError, match=r"11 channels; compress with round_to=8, or choose backend=onnx"):
        by_pt2e(odd, PICTURES[:1], [PICTURES])


def test_networks_without_such_a_layer_are_refused():
    with pytest.raises(UserError, match="ReLU has no layer that torchao quantizes this way"):
        by_pt2e(nn.ReLU(), PICTURES[:1], [PICTURES])
    with pytest.raises(UserError, match="Conv2d has no layer that torchao quantizes this way"):
        by_tensors(nn.Conv2d(3, 8, 3), "int8")


def test_what_a_backend_needs_follows_from_its_options():
    assert parse_tail("ptq(backend=pt2e)")[0].needs == {"calibration"}
    assert parse_tail("ptq(backend=pt2e,calibrate=synthetic)")[0].needs == frozenset()
    (stage,) = parse_tail("ptq(backend=torchao)")
    supplies = Supplies(net(), PICTURES[:1], TASK)
    assert (stage.needs, stage.facts, tuple(stage.seen(supplies))) == (
        frozenset(),
        {},
        (0, 0),
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ptq(backend=nncf)", "unknown backend 'nncf'.*onnx, openvino, pt2e, torchao"),
        ("ptq(backend=pt2e,range=entropy)", "ptq: range=entropy is no option of backend=pt2e; leave it out"),
        ("ptq(backend=torchao,calibrate=synthetic)", "calibrate=synthetic is no option of backend=torchao"),
        ("ptq(activations=float)", "activations=float is no option of backend=onnx"),
        ("ptq(backend=pt2e) > export", "export cannot follow.*a program for torch.compile"),
        ("ptq(backend=torchao) > repair", "repair cannot follow.*a program for torch.compile"),
    ],
)
def test_options_and_orders_that_cannot_work_are_refused(text, why):
    with pytest.raises(UserError, match=why):
        parse_chain(text)


@pytest.mark.parametrize("chain", ["ptq", "export", "ptq(backend=torchao)"])
def test_a_finished_file_is_not_saved_as_a_compressed_network(chain, tmp_path):
    with pytest.raises(UserError, match=r"is a finished file and has no weights to save: write its file with \.write"):
        save_compressed(after(chain, net()), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_torchao_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    for backend in ("pt2e", "torchao"):
        reason = parse_tail(f"ptq(backend={backend})")[0].reason_against(net())
        assert reason.endswith("pip install 'foldability[torchao]'")
        assert "\n" not in reason
