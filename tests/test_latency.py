"""Measured speed and memory: exact counts are exact, and a failure says why."""

import functools
import math
import random
import statistics
from statistics import fmean

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline import latency
from pipeline.compression.sizes.count import macs, parameters
from pipeline.latency import LEAST, RUNTIMES, compiled, doubt_of, eager, paired, peak_memory, profile, race
from pipeline.tables import UserError

CPU = torch.device("cpu")


def net(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 5)
    )


EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_profile_is_one_record_for_each_runtime_and_batch(tmp_path):
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = profile(model, EXAMPLE, (1, 3), ("eager", "onnx"), seconds=0.01)
    assert [(p.runtime, p.batch_size) for p in found] == [("eager", 1), ("eager", 3), ("onnx", 1), ("onnx", 3)]
    for p in found:
        assert 0 < p.low <= p.median <= p.high
        assert p.repeats >= LEAST
        assert (p.params, p.macs, p.reason) == (parameters(model), macs(model, EXAMPLE), "")
        assert (p.memory is None) == (p.runtime == "onnx")
    assert found[1].memory > found[0].memory
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    header = 8 + int.from_bytes((tmp_path / "net.safetensors").read_bytes()[:8], "little")
    assert found[0].size == (tmp_path / "net.safetensors").stat().st_size - header
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_network_is_timed_beside_another():
    (alone,) = profile(net(), EXAMPLE, (1,), seconds=0.0)
    assert all(map(math.isnan, (alone.speedup, alone.beside, alone.doubt)))
    large = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(200)), net())
    (found,) = profile(net(), EXAMPLE, (1,), seconds=0.05, beside=large)
    assert found.speedup > 3
    assert found.beside > 3 * found.median / 2
    assert found.doubt > 0
    assert found.params == parameters(net())


def test_a_pair_is_of_passes_that_follow_each_other():
    """Other load slows both passes of a pair, so that it moves their times and not their ratio."""
    own = [1.0, 9.0, 2.0, 1.0, 5.0]
    assert paired(own, [2 * t for t in own]) == {"speedup": 2.0, "beside": 4.0, "doubt": 0.0}


def test_doubt_is_the_notch_of_the_speedups():
    assert doubt_of([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.57 * 2 / math.sqrt(5) / 3)
    assert doubt_of([10.0, 20.0, 30.0, 40.0, 50.0]) == pytest.approx(doubt_of([1.0, 2.0, 3.0, 4.0, 5.0]))
    drawn = random.Random(0)
    medians = [statistics.median(drawn.gauss(10, 1) for _ in range(101)) for _ in range(400)]
    notch = doubt_of([drawn.gauss(10, 1) for _ in range(101)]) * 10
    assert 0.9 < fmean(abs(m - 10) < notch for m in medians) < 1


def test_peak_memory_is_exact(capfd):
    """Two activations live at once, and only while the second is made from the first."""
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()).requires_grad_(False)
    run = eager(model, torch.zeros(1, 4))(torch.zeros(10, 4))
    assert peak_memory(run, CPU) == peak_memory(run, CPU) == 2 * 10 * 100 * 4
    assert peak_memory(eager(model, torch.zeros(1, 4))(torch.zeros(30, 4)), CPU) == 2 * 30 * 100 * 4
    assert capfd.readouterr() == ("", "")


def test_passes_take_turns():
    order = []
    times = race([lambda: order.append("a"), lambda: order.append("b")], CPU, seconds=0.0)
    assert order == ["a", "b"] * (1 + LEAST)  # one to warm up
    assert [len(spent) for spent in times] == [LEAST, LEAST]
    (many,) = race([lambda: None], CPU, seconds=0.05)
    assert len(many) > LEAST


def test_a_runtime_that_fails_costs_its_records(monkeypatch):
    def broken(network, example):
        raise RuntimeError("no compiler\nand more lines")

    def large(network, example):
        def bind(inputs):
            if len(inputs) > 1:
                raise torch.OutOfMemoryError("not enough memory")
            return lambda: None

        return bind

    monkeypatch.setattr(latency, "RUNTIMES", {**RUNTIMES, "broken": broken, "large": large})
    found = profile(net(), EXAMPLE, (1, 2), ("broken", "large", "eager"), seconds=0.0)
    assert [bool(p.reason) for p in found] == [True, True, False, True, False, False]
    assert found[0].reason == "RuntimeError: no compiler"
    assert found[3].reason == "OutOfMemoryError: not enough memory"
    assert all(math.isnan(p.median) and p.repeats == 0 and p.memory is None and p.params for p in found if p.reason)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"runtimes": ["egaer"]}, r"unknown runtime 'egaer' .*; choose from: compiled, eager, onnx"),
        ({"batch_sizes": [1, 0]}, "batch size 0 must be at least 1"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(UserError, match=match):
        profile(net(), EXAMPLE, **arguments)


def test_onnx_that_is_missing(monkeypatch):
    monkeypatch.setattr("pipeline.export.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ONNX needs onnx: pip install 'foldability\[onnx\]'"):
        profile(net(), EXAMPLE, runtimes=["onnx"])


def test_many_networks_of_one_class_are_all_compiled(monkeypatch):
    """torch.compile gives up on a forward after some networks, silently, and runs the next one eagerly."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):  # some library raises it
        for width in range(1, 5):
            (found,) = profile(net(width), EXAMPLE, (1,), ("compiled",), seconds=0.0)
            assert found.reason == ""


@pytest.mark.slow
def test_compiled_computes_the_same():
    model = net().eval()
    bind = compiled(model, EXAMPLE)
    for size in (1, 4):
        x = torch.randn(size, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(bind(x)(), model(x))
    found = profile(model, EXAMPLE, (1, 4), ("compiled",), seconds=0.1)
    assert [p.reason for p in found] == ["", ""]
    assert all(p.memory > 0 for p in found)


@pytest.mark.gpu
def test_on_a_gpu():
    model = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 1)).cuda()
    found = profile(model, torch.zeros(1, 4, device="cuda"), (10, 1000), ("eager", "onnx", "openvino"), seconds=0.1)
    assert found[1].memory > found[0].memory >= 2 * 10 * 1000 * 4
    assert all("is measured on the CPU, and the network is on cuda:0" in p.reason for p in found[2:])
