"""Int8 files: they follow from the definition of a grid, are measured as networks are, and nothing may change them."""

import copy

import numpy as np
import onnx
import pytest
import stage_nets
import torch
from onnx import numpy_helper
from torch import nn

from pipeline.chains import settings
from pipeline.compression.checkpoint import stored_size
from pipeline.compression.copies import bare_copy
from pipeline.compression.plan import history
from pipeline.evaluate import metrics_of
from pipeline.latency import profile
from pipeline.onnx_network import OnnxNetwork
from pipeline.stages import Followed, State, Supplies, parse_chain, parse_tail
from pipeline.stages.ptq import RANGES, Ptq, int8_file
from pipeline.tables import UserError
from pipeline.tasks import Classification

PICTURES = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 - 1
LABELS = torch.randint(4, (64,), generator=torch.Generator().manual_seed(0))
BATCHES = list(zip(PICTURES.split(32), LABELS.split(32), strict=True))
TASK = Classification("multiclass", "logits", classes=4)


def net() -> nn.Module:
    return stage_nets.net(PICTURES)


def followed(dense: nn.Module) -> Followed:
    return Followed(State(dense), Supplies(dense, PICTURES[:1], TASK, BATCHES))


@pytest.fixture(scope="module")
def quantized():
    """(the network, its int8 file as a module)"""
    dense = net()
    with torch.no_grad():
        return dense, followed(dense).state(parse_chain("ptq")).model


def test_the_file_computes_nearly_what_the_network_does(quantized):
    dense, file = quantized
    with torch.no_grad():
        expected, found = dense(PICTURES), file(PICTURES)
    assert found.shape == expected.shape
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    one = file(PICTURES[:1])  # another batch size
    torch.testing.assert_close(one, found[:1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("saturates", "steps"), [(False, 127), (True, 64)])
def test_scales_and_zeros_of_the_file_are_those_of_the_definition(saturates, steps, monkeypatch):
    """Activations: scale = range / 255, zero = round(-low / scale); weights: ±127 steps to the largest of a channel, or
    ±64, so that sums of 16 bits never overflow."""
    monkeypatch.setattr("pipeline.stages.ptq.saturates", lambda: saturates)
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, bias=False).eval()
    file = onnx.load_from_string(int8_file(layer, PICTURES[:1], list(PICTURES.split(16)), "minmax"))
    numbers = {one.name: numpy_helper.to_array(one) for one in file.graph.initializer}
    (given,) = (
        node
        for node in file.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] == file.graph.input[0].name
    )
    low, high = min(float(PICTURES.min()), 0.0), max(float(PICTURES.max()), 0.0)
    scale, zero = (numbers[name] for name in given.input[1:])
    assert float(scale) == pytest.approx((high - low) / 255, rel=1e-5)
    assert int(zero) == round(-low / float(scale))
    (codes,) = (value for value in numbers.values() if value.dtype == np.int8 and value.ndim == 4)
    (scales,) = (value for value in numbers.values() if value.dtype == np.float32 and value.shape == (8,))
    weight = layer.weight.detach().numpy()
    assert scales == pytest.approx(abs(weight).max((1, 2, 3)) / steps, rel=1e-5)
    assert (abs(codes * scales[:, None, None, None] - weight) <= 0.5001 * scales[:, None, None, None]).all()


def test_it_is_evaluated_copied_and_timed_as_a_network_is(quantized, tmp_path):
    dense, file = quantized
    found, whole = (metrics_of(one, TASK, BATCHES) for one in (file, dense))
    assert found["acc"] == pytest.approx(whole["acc"], abs=0.05)
    assert found["loss"] == pytest.approx(whole["loss"], abs=0.05)
    for twin in (copy.deepcopy(file), bare_copy(file)):
        assert torch.equal(twin(PICTURES), file(PICTURES))
        assert twin.content is not file.content
    assert [str(step) for step in history(bare_copy(file))] == ["ptq"]
    file.write(tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").stat().st_size == stored_size(file) == len(file.content)
    eager, onnx_ = profile(file, PICTURES[:1], [1], ["eager", "onnx"], seconds=0.01, beside=dense)
    assert "choose the runtime onnx" in eager.reason
    assert onnx_.median > 0
    assert onnx_.speedup > 0
    own = profile(dense, PICTURES[:1], [1], ["eager"], seconds=0.01)[0]
    assert (onnx_.params, onnx_.macs, onnx_.size) == (own.params, own.macs, stored_size(file))


@pytest.mark.parametrize("ranges", RANGES)
def test_every_way_to_choose_ranges_gives_a_file_of_its_own_use(ranges):
    dense = net()
    file = OnnxNetwork(int8_file(dense, PICTURES[:1], PICTURES, ranges), dense, PICTURES[:1], 1, 1)
    with torch.no_grad():
        assert (file(PICTURES) - dense(PICTURES)).norm() / dense(PICTURES).norm() < 0.2


def test_synthetic_pictures_need_no_data():
    dense = net()
    supplies = Supplies(dense, PICTURES[:1], TASK)  # no batches
    (stage,) = parse_tail("ptq(calibrate=synthetic)")
    assert stage.needs == frozenset()
    assert stage.seen(supplies) == (0, 0)
    with torch.no_grad():
        file = Followed(State(dense), supplies).state((stage,)).model
        assert (file(PICTURES) - dense(PICTURES)).norm() / dense(PICTURES).norm() < 0.2


@pytest.mark.parametrize(
    "stage", ["fold@0.5", "l2@0.5", "lamp@0.5", "tune", "tune_norms", "distil", "repair", "quantize", "ptq"]
)
def test_nothing_that_changes_a_network_can_follow(stage):
    with pytest.raises(UserError, match="cannot follow ptq: the network is a finished file"):
        parse_chain(f"ptq > {stage}")


def test_it_may_come_behind_anything_else():
    chain = parse_chain("fold@0.5 > repair > quantize(bits=4) > repair > ptq(range=percentile)")
    with torch.no_grad():
        state = followed(net()).state(chain)
    assert isinstance(state.model, OnnxNetwork)
    assert len(history(state.model)) == 5
    assert state.model.params < sum(p.numel() for p in net().parameters())


def test_operations_whose_shapes_onnx_runtime_cannot_follow_are_no_obstacle():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    file = followed(dense).state(parse_chain("ptq")).model
    with torch.no_grad():
        expected, found = dense(PICTURES), file(PICTURES)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_outputs_keep_their_structure():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, object]:
            return {"scores": self.layer(x) * scale, "pair": (self.layer(x), None)}

    torch.manual_seed(0)
    two, example = Two().eval(), {"x": torch.randn(64, 6), "scale": torch.rand(64, 1)}
    small = {name: tensor[:1] for name, tensor in example.items()}
    file = OnnxNetwork(int8_file(two, small, example, "minmax"), two, small, 1, 1)
    found = file(**example)
    assert found["pair"][1] is None
    torch.testing.assert_close(found["scores"], found["pair"][0] * example["scale"], rtol=0.05, atol=0.05)


class OwnNorm(nn.Module):
    """An RMSNorm as language models write it, which an ONNX file holds in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class OwnRMSNorm(OwnNorm):
    pass


class Block(nn.Module):
    """A transformer's block: attention, and a sum that runs past it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mix, self.out = norm, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, keys, found = self.mix(self.norm(x)).chunk(3, -1)
        return x + self.out((queries @ keys.transpose(1, 2)).softmax(-1) @ found)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x, x, x, need_weights=False)[0]


def of_int8(content: bytes) -> list[str]:
    """The operations whose numbers have all come from 8 bits, one entry each."""
    nodes = onnx.load_from_string(content).graph.node
    made = {name: node.op_type for node in nodes for name in node.output}
    given = [(node.op_type, [made[name] for name in node.input if name in made]) for node in nodes]
    return sorted(op for op, makers in given if set(makers) == {"DequantizeLinear"} and op != "QuantizeLinear")


def transformer(norm: type[nn.Module] = nn.LayerNorm) -> nn.Module:
    torch.manual_seed(0)
    sizes = () if issubclass(norm, OwnNorm) else (4, 16) if norm is nn.GroupNorm else (16,)
    return nn.Sequential(Block(norm(*sizes)), Block(norm(*sizes))).eval()


def tokens() -> torch.Tensor:
    """With a channel that is far larger than the rest, as trained transformers have."""
    x = torch.randn(64, 5, 16, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 100
    return x


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, OwnRMSNorm])
def test_of_a_transformer_operations_with_weights_are_quantized_and_nothing_in_between(norm):
    net, x = transformer(norm), tokens()
    content = int8_file(net, x[:1], x, "minmax")
    assert of_int8(content) == ["MatMul"] * 4
    with torch.no_grad():
        assert off(net, content, x) < 0.01


def off(net: nn.Module, content: bytes, x: torch.Tensor) -> float:
    """How far the file is off, in the channels that are as large as each other."""
    found, expected = OnnxNetwork(content, net, x[:1], 1, 1)(x), net(x)
    usual = [i for i in range(16) if i != 3]
    return float((found - expected)[..., usual].norm() / expected[..., usual].norm())


def test_a_large_channel_of_the_sum_does_not_blur_the_others(monkeypatch):
    net, x = transformer(), tokens()
    with torch.no_grad():
        apart = off(net, int8_file(net, x[:1], x, "minmax"), x)
        monkeypatch.setattr("pipeline.stages.ptq.normalizes", lambda model: False)
        assert 10 * apart < off(net, int8_file(net, x[:1], x, "minmax"), x)


def test_attention_without_norms_is_known_by_its_layer():
    torch.manual_seed(0)
    x = torch.randn(8, 5, 16)
    assert set(of_int8(int8_file(Attends().eval(), x[:1], x, "minmax"))) <= {"MatMul", "Gemm"}


class Residual(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.norm(self.two(x)).relu()


@pytest.mark.parametrize(
    ("norm", "sums"), [(nn.BatchNorm2d(3), True), (nn.GroupNorm(1, 3), False), (nn.Identity(), True)]
)
def test_sums_are_quantized_where_no_norm_is_of_the_sample_itself(norm, sums):
    torch.manual_seed(0)
    found = of_int8(int8_file(Residual(norm).eval(), PICTURES[:1], PICTURES, "minmax"))
    assert found.count("Conv") == 2
    assert ("Add" in found) == sums


def test_a_network_without_int8_operations_is_refused():
    with pytest.raises(UserError, match="ReLU has nothing that ONNX Runtime computes in int8; leave ptq out"):
        int8_file(nn.ReLU(), torch.randn(1, 3), torch.randn(8, 3), "minmax")


def test_missing_libraries_are_one_line(monkeypatch):
    monkeypatch.setattr("pipeline.export.find_spec", lambda name: None if name == "onnxruntime" else True)
    assert parse_tail("ptq")[0].reason_against(net()) == "ONNX needs onnxruntime: pip install 'foldability[onnx]'"


def test_a_file_for_one_kind_of_cpu_is_not_taken_for_that_of_another(monkeypatch):
    names = []
    for kept_in_16_bits in (False, True):
        monkeypatch.setattr("pipeline.stages.ptq.saturates", lambda kept=kept_in_16_bits: kept)
        names.append(settings(Ptq()))
    assert names[0] != names[1]
