"""Chains on disk: folders are shared, resumed after a kill, and done anew only where something changed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chains_to_kill import CHAIN, POINTS, cut_off, ground, net, rows_of
from safetensors import safe_open
from torch import nn

import pipeline.chains
from pipeline.chains import NETWORK, ready, settings
from pipeline.compression.checkpoint import load_compressed
from pipeline.compression.plan import history
from pipeline.results import Row
from pipeline.stages import Repair, parse_chain, parse_chains, spell_chain
from pipeline.tables import UserError


@pytest.fixture
def stages(monkeypatch) -> list[str]:
    """The stages that were really done."""
    done: list[str] = []
    real = pipeline.chains.advanced

    def noting(stage, *args):
        done.append(str(stage))
        return real(stage, *args)

    monkeypatch.setattr(pipeline.chains, "advanced", noting)
    return done


def files(store: Path) -> dict[str, bytes]:
    """{stage's folder: its network}; a folder that is no whole one would be among them."""
    return {path.parent.name: path.read_bytes() for path in store.glob(f"*/{NETWORK}")}


def test_chains_that_begin_alike_share_their_folders(tmp_path, stages):
    texts = ["fold@0.5 > repair > tune", "fold@0.5 > repair > quantize(bits=4)", "fold@0.5"]
    rows = rows_of(texts, ground(tmp_path))
    assert stages == ["fold@0.5", "repair", "tune", "quantize(bits=4)"]
    assert [row.chain for row in rows] == [
        "", "fold@0.5", "fold@0.5 > repair", "fold@0.5 > repair > tune", "fold@0.5 > repair > quantize(bits=4)"
    ]  # fmt: skip
    assert {row.status for row in rows} == {"ok"}, [row.reason for row in rows]
    assert len(files(tmp_path)) == 4


def test_a_second_run_does_nothing_and_gives_the_same_rows(tmp_path, stages):
    first = rows_of([CHAIN], ground(tmp_path))
    stages.clear()
    assert rows_of([CHAIN], ground(tmp_path)) == first
    assert stages == []


def test_only_what_changed_is_done_anew(tmp_path, stages):
    rows_of(["l1@0.5 > repair > tune > quantize(bits=4)"], ground(tmp_path))
    stages.clear()
    rows_of(["l1@0.5 > repair > tune > quantize(bits=3)"], ground(tmp_path))
    assert stages == ["quantize(bits=3)"]
    stages.clear()
    rows_of(["l1@0.5 > repair > tune(epochs=2) > quantize(bits=4)"], ground(tmp_path))
    assert stages == ["tune(epochs=2)", "quantize(bits=4)"], "its input is another one"
    stages.clear()
    other = ground(tmp_path)
    other.name = "another network"
    rows_of(["l1@0.5"], other)
    assert stages == ["l1@0.5"]
    assert other.folder(parse_chain("distil(labels=0)")) == other.folder(parse_chain("distil(epochs=1)"))
    taught = ground(tmp_path)
    assert taught.folder(parse_chain("distil(teacher=big)")) != ground(tmp_path).folder(parse_chain("distil"))
    before = taught.folder(parse_chain("distil(teacher=big)"))
    taught.hashes = {"big": "other weights"}
    assert taught.folder(parse_chain("distil(teacher=big)")) != before


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, list]:
    """The networks and rows of a run that nothing cut off."""
    folder = tmp_path_factory.mktemp("whole")
    rows = rows_of([CHAIN], ground(folder))
    return networks(folder), told(rows)


def networks(store: Path) -> dict[str, tuple]:
    """{stage's folder: the manifest and the checksum of its network}"""
    found = {}
    for path in store.glob(f"*/{NETWORK}"):
        with safe_open(path, "pt") as file:
            found[path.parent.name] = tuple(sorted(file.metadata().items()))
    return found


def told(rows: list[Row]) -> list[tuple]:
    return [(row.chain, row.loss, row.bytes, row.unlabelled, row.labelled, row.params) for row in rows]


def killed(folder: Path, point: str) -> None:
    script = Path(__file__).parent / "chains_to_kill.py"
    ended = subprocess.run([sys.executable, script, folder, point], capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr


def interrupted(folder: Path, point: str) -> None:
    def end() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*cut_off(point, end))
        with pytest.raises(KeyboardInterrupt):
            rows_of([CHAIN], ground(folder))


def test_a_stage_that_works_otherwise_than_it_did_has_other_folders_and_the_rest_keep_theirs(monkeypatch):
    (tune, ptq) = parse_chain("tune > ptq")
    (more,) = parse_chain("tune(on=self,size=9)")
    (real, fewer, made) = (parse_chain(f"mix+{text}@0.5")[0] for text in ("data", "synthetic+size=128", "synthetic"))
    assert [len(settings(stage)) for stage in (real, fewer, made)] == [2, 2, 3]
    assert settings(more)[1]["size"] == 9
    assert settings(tune) == ["Tune", {"epochs": 1.0, "lr": 1e-4, "on": "'data'"}]
    today = settings(ptq)
    monkeypatch.setattr(type(ptq), "version", 1)
    assert settings(ptq) != today


@pytest.mark.parametrize(("end", "point"), [(killed, "inside of distil"), *((interrupted, point) for point in POINTS)])
def test_a_run_that_is_cut_off_goes_on_and_ends_as_it_would_have(end, point, whole, tmp_path, stages):
    end(tmp_path, point)
    there = networks(tmp_path)
    finished = {name for name in there if not name.endswith(".part")}
    assert len(finished) < 5
    stages.clear()
    rows = rows_of([CHAIN], ground(tmp_path))
    assert (networks(tmp_path), told(rows)) == whole
    assert not list(tmp_path.glob("*.part"))
    if point == "before the last repair":
        assert stages == ["repair"], "it goes by the network before the grid, which has its file"
    if point == "inside of distil":
        assert stages[0] == "distil(epochs=3)"


def test_a_row_says_what_was_done_and_what_it_took(tmp_path):
    rows = rows_of(["fold@0.5 > repair > tune > quantize(bits=3)", "distil > l1@0.25"], ground(tmp_path))
    assert [(row.method, row.ratio, row.stage, row.kind, row.unlabelled, row.labelled) for row in rows] == [
        ("dense", 0.0, "raw", "dense", 0, 0),
        ("fold", 0.5, "raw", "fold", 0, 0),
        ("fold", 0.5, "repaired", "fold", 64, 0),
        ("fold", 0.5, "tuned", "fold", 64, 64),
        ("fold", 0.5, "repair > tune > quantize(bits=3)", "fold", 64, 64),
        ("none", 0.0, "distil", "none", 64, 0),
        ("l1", 0.25, "distil > l1@0.25", "prune", 64, 0),
    ]
    dense, folded, *_, low, distilled, _ = rows
    assert low.params == folded.params < dense.params == distilled.params
    assert low.error == folded.error > 0
    assert low.bytes < folded.bytes
    for row in rows[1:]:
        (file,) = (f for f in tmp_path.glob(f"*/{NETWORK}") if history_of(f) == row.chain)
        assert row.bytes == file.stat().st_size


def history_of(file: Path) -> str:
    return spell_chain(history(load_compressed(file, net())[0]))


def test_a_stage_that_fails_costs_its_chain_from_there_on(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Repair, "run", broken)
    with pytest.warns(RuntimeWarning, match="fold@0.5 > repair: RuntimeError: out of luck"):
        rows = rows_of(["fold@0.5 > repair > tune", "fold@0.5 > tune"], ground(tmp_path))
    assert [row.status for row in rows] == ["ok", "ok", "failed", "failed", "ok"]
    assert {row.reason for row in rows[2:4]} == {"RuntimeError: out of luck"}
    monkeypatch.undo()
    assert {row.status for row in rows_of(["fold@0.5 > repair > tune"], ground(tmp_path))} == {"ok"}


def test_a_file_is_a_stage_like_another_and_is_read_again(tmp_path, stages):
    pytest.importorskip("onnxruntime")
    text = "fold@0.5 > repair > ptq > export"
    rows = rows_of([text, "fold@0.5 > export"], ground(tmp_path))
    assert {row.status for row in rows} == {"ok"}, [row.reason for row in rows]
    assert rows[3].loss == rows[4].loss != rows[2].loss
    assert rows[5].loss == pytest.approx(rows[1].loss, rel=1e-5)
    (file,) = {path.read_bytes() for path in tmp_path.glob("*/network.onnx") if path.stat().st_size == rows[3].bytes}
    again = ground(tmp_path)
    found = pipeline.chains.state_of(parse_chain(text), again).model
    assert bytes(found.content.numpy()) == file
    assert [str(step) for step in history(found)] == text.split(" > ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tune > quantize(bits=4) > tune", "tune cannot follow quantize.*: the weights lie on the grid"),
        ("quantize(bits=4) > fold@0.5", "fold@0.5 cannot follow quantize"),
        ("quantize(bits=4) > distil", "distil cannot follow quantize"),
        *((f"ptq > {stage}", f"{stage.split('(')[0]} cannot follow ptq: the network is a finished file")
          for stage in ("fold@0.5", "l1@0.5", "magnitude@0.5", "tune", "distil", "repair", "tune_norms", "ptq")),
        ("repair > distil > repair", "the second repair finds nothing to repair"),
        ("fold@0.5 > repare", r"unknown stage 'repare' \(did you mean 'repair'\?\)"),
    ],
)  # fmt: skip
def test_an_impossible_order_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_chain(text)
    assert "\n" not in str(caught.value)


class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("fold@0.5 > repair", {"batches": []}, "repair needs training samples, and there are none"),
        ("fold+data@0.5", {"batches": []}, r"fold\+data@0.5 needs training samples"),
        ("repair", {"dense": nn.Sequential(nn.Flatten(), nn.Linear(192, 4))}, "no BatchNorm keeps statistics"),
        ("tune(on=self)", {}, "on=self trains on texts, and the task is classification"),
        ("fold+data+size=99@0.5", {}, "size=99 asks for more samples than the 64 there are"),
        ("fold+protect=[layer9]@0.5", {}, "no group's name begins with 'layer9'"),
        (
            "distil(teacher=big)",
            {"teachers": {"big": Other}},
            "teacher 'big': the teacher says 3 classes and the network 4",
        ),
    ],
)
def test_what_a_stage_lacks_is_said_before_any_work(text, more, message, tmp_path):
    on = ground(tmp_path, **more)
    with pytest.raises(UserError, match=message) as caught:
        ready([parse_chain(text)], on)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("listed", "text"),
    [
        (["repair"], "repair"),
        ([{"fold": {"method": "mix+data", "ratio": 0.3}}, "repair"], "mix+data@0.3 > repair"),
        ([{"fold": {"ratio": 0.5, "protect": ["a", "b"]}}], "fold+protect=[a,b]@0.5"),
        ([{"prune": {"method": "l1", "ratio": 0.5, "round_to": 8}}], "l1+round_to=8@0.5"),
        ([{"mask": {"method": "magnitude", "ratio": 0.5}}, {"tune": None}], "magnitude@0.5 > tune"),
        (["fold@0.5", {"distil": {"epochs": 5, "labels": 0}}], "fold@0.5 > distil(epochs=5)"),
        ([{"quantize": {"bits": 4, "per": "tensor"}}, {"ptq": {"calibrate": "synthetic"}}, "export"],
         "quantize(bits=4,per=tensor) > ptq(calibrate=synthetic) > export"),
    ],
)  # fmt: skip
def test_lists_and_texts_give_the_same_chain(listed, text):
    assert parse_chain(listed) == parse_chain(text)
    assert spell_chain(parse_chain(listed)) == text
    assert parse_chain(spell_chain(parse_chain(text))) == parse_chain(text)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([{"fold": {"method": "l1", "ratio": 0.5}}], "fold: method 'l1' is of the kind prune; write it as prune:"),
        ([{"fold": {"method": "mix"}}], "fold: ratio None must be a number"),
        ([{"tune": {"epochs": 3}, "repair": {}}], "must be a name, or one name with its options"),
        ([{"tune": 3}], "options of stage 'tune' must be {option: value}, got 3"),
        ([{"tune": {"epoch": 3}}], "stage 'tune' has no option 'epoch'; it takes: epochs, lr, on"),
        ([{"fold": {"method": "mix+data", "pictures": "none", "ratio": 0.5}}], "pictures=data and the options say"),
        (3, "chain 3 must be a text"),
    ],
)  # fmt: skip
def test_lists_that_make_no_sense_get_one_line(said, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_chain(said)
    assert "\n" not in str(caught.value)


def test_braces_stand_for_several_chains():
    found = parse_chains("fold@{0.3,0.5} > quantize(bits={3,4})")
    assert list(found) == [f"fold@{ratio} > quantize(bits={bits})" for ratio in (0.3, 0.5) for bits in (3, 4)]
    assert list(parse_chains({"a": ["fold@0.5"], "b": "l1@{0.1,0.2}"})) == ["a", "b: l1@0.1", "b: l1@0.2"]
    assert list(parse_chains(["fold@0.5", ["l1@0.5", "repair"]])) == ["fold@0.5", "l1@0.5 > repair"]
    for nothing in ({}, [], ""):
        with pytest.raises(UserError, match=r"chains is empty|has no stage"):
            parse_chains(nothing)
