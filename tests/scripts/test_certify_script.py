"""The certificate of a file is read, checked, and recomputed from the checkpoint that was compressed."""

import sys

import pytest
import torch

from pipeline.compression import channel_groups, compress
from pipeline.compression.checkpoint import save_compressed
from pipeline.compression.plan import Step, remember_
from pipeline.models import build_model
from pipeline.stages.stage import Traces
from scripts import certify

NARROW = {"name": "resnet20", "classes": 4, "channels": 3}
ABOUT = {"pictures": {"size": 8}}
EXAMPLE = torch.zeros(1, 3, 8, 8)
TRACES = Traces()


def network(seed=0):
    torch.manual_seed(seed)
    return build_model(**NARROW).eval()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "net.pt"
    torch.save(network().state_dict(), path)
    return path


def write(path, method="mix", about=ABOUT, stages=(), **options):
    net = network()
    groups = None if method == "magnitude" else TRACES.of(net, EXAMPLE, ("hidden", "residual"))
    made = compress(net, EXAMPLE, method, 0.5, groups=groups, **options)
    remember_(made.model, *map(Step, stages))
    save_compressed(made, path, about, architecture=NARROW)
    return path


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """(exit code, all that was printed)"""
    monkeypatch.setattr(sys, "argv", ["certify", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        certify.main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return left.value.code, said.out + said.err


@pytest.mark.parametrize(
    ("method", "arguments", "code", "says"),
    [
        ("mix", (), 0, "holds: no pruning at the same rank has a smaller parameter error, in any of 9 groups"),
        ("fold", ("--theorem",), 0, "holds: no pruning with one channel less has a smaller parameter error"),
        ("random", (), 1, "does not hold: a pruning has a smaller parameter error at the same rank in 9 of 9 groups"),
    ],
)
def test_the_file_alone_is_judged(method, arguments, code, says, tmp_path, monkeypatch, capsys):
    found, said = run(monkeypatch, capsys, write(tmp_path / "net.safetensors", method), *arguments)
    assert (found, says in said) == (code, True), said
    assert "layer1.0.conv1    16 -> 8" in said


@pytest.mark.parametrize("stages", [(), ("repair",)])
def test_the_source_confirms_numbers_and_weights(stages, dense, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "net.safetensors", stages=stages)
    code, said = run(monkeypatch, capsys, path, "--source", dense)
    assert code == 0, said
    assert "recomputed from the weights of the source: 9 of 9 groups" in said
    assert "merged again from the weights of the source" in said


def test_weights_that_were_trained_since_are_not_compared(dense, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "net.safetensors", stages=("repair", "tune"))
    code, said = run(monkeypatch, capsys, path, "--source", dense)
    assert (code, "weights not compared" in said) == (0, True), said


def test_another_checkpoint_contradicts_the_file(tmp_path, monkeypatch, capsys):
    torch.save(network(seed=1).state_dict(), tmp_path / "other.pt")
    path = write(tmp_path / "net.safetensors")
    code, said = run(monkeypatch, capsys, path, "--source", tmp_path / "other.pt")
    assert (code, "is stated as" in said) == (1, True), said


def test_a_weight_that_was_changed_is_found_by_the_source_alone(dense, tmp_path, monkeypatch, capsys):
    net = network()
    made = compress(net, EXAMPLE, "mix", 0.5, groups=TRACES.of(net, EXAMPLE, ("hidden", "residual")))
    with torch.no_grad():
        made.model.layer1[0].conv1.weight[0, 0, 0, 0] += 0.1
    save_compressed(made, path := tmp_path / "net.safetensors", ABOUT, architecture=NARROW)
    assert run(monkeypatch, capsys, path)[0] == 0
    code, said = run(monkeypatch, capsys, path, "--source", dense)
    assert (code, "layer1.0.conv1.weight is not the source's, merged as the labels say" in said) == (1, True), said


def test_a_damaged_file_cannot_be_read(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "net.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    code, said = run(monkeypatch, capsys, path)
    assert (code, "is damaged" in said) == (2, True), said


def test_a_file_without_a_certificate_says_so_and_the_source_gives_one(dense, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "net.safetensors", certify=False)
    code, said = run(monkeypatch, capsys, path)
    assert (code, "9 of 9 groups have no certificate" in said) == (2, True), said
    code, said = run(monkeypatch, capsys, path, "--source", dense)
    assert (code, "holds: no pruning at the same rank" in said) == (0, True), said


def test_a_masked_network_has_nothing_to_certify(tmp_path, monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, write(tmp_path / "net.safetensors", "magnitude"))
    assert (code, "there is nothing to certify" in said) == (2, True), said


def test_a_size_that_the_file_does_not_say_is_asked_for(dense, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "net.safetensors", about={})
    code, said = run(monkeypatch, capsys, path, "--source", dense)
    assert (code, "give their height as --size=32" in said) == (2, True), said
    assert run(monkeypatch, capsys, path, "--source", dense, "--size", 8)[0] == 0


def test_a_second_compression_is_recomputed_from_the_first(dense, tmp_path, monkeypatch, capsys):
    net = network()
    once = compress(net, EXAMPLE, "mix", 0.3, groups=TRACES.of(net, EXAMPLE, ("hidden", "residual")))
    twice = compress(once.model, EXAMPLE, "mix", 0.3, groups=channel_groups(once.model, EXAMPLE))
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_compressed(once, first, ABOUT, architecture=NARROW)
    save_compressed(twice, second, ABOUT, architecture=NARROW)
    code, said = run(monkeypatch, capsys, second, "--source", first)
    assert (code, "in any of 18 groups" in said) == (0, True), said
    assert run(monkeypatch, capsys, second, "--source", dense)[0] == 0, "the first compression is the source's"
    code, said = run(monkeypatch, capsys, first, "--source", second)
    assert (code, "does not compress" in said) == (2, True), said
