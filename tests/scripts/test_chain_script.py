"""Chains as users type them, behind a training and on a checkpoint; what cannot be is refused before the work."""

import re
from pathlib import Path

import polars as pl
import pytest
from composing import TINY, composed, composed_compress

from pipeline.cells import read_record
from pipeline.results import CHAIN_ROWS, CHAIN_SPEED, read
from pipeline.tables import UserError
from scripts.arguments import checked
from scripts.chain import PICTURE, STORE, chains_in, quoted_chains
from scripts.compress import expanded
from scripts.compress import run as compress
from scripts.naming import cell_of
from scripts.train import run as train

CHAIN = "chain='fold@0.5 > repair > distil'"
DIGITS = ["model.width=4", "data.test_size=50", "profile.seconds=0.01", "profile.batch_sizes=[1]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("trained")
    return train(composed("experiment=quickstart", *DIGITS, *TINY, CHAIN, f"paths.runs={runs}"))


def stages(folder: Path) -> dict[str, float]:
    """{stage's folder: when its network was written}"""
    return {path.parent.name: path.stat().st_mtime for path in (folder / STORE).glob("*/network.safetensors")}


def test_chains_follow_a_training_and_the_cell_stays_what_it_was(trained, capsys):
    rows = read(trained / CHAIN_ROWS)
    assert rows["chain"].to_list() == ["", "fold@0.5", "fold@0.5 > repair", "fold@0.5 > repair > distil"]
    assert set(rows["status"]) == {"ok"}
    dense = read(trained / "rows.parquet").filter(method="dense", split="test")
    assert rows["loss"][0] == pytest.approx(dense["loss"].item(), rel=1e-4)
    assert pl.read_parquet(trained / CHAIN_SPEED)["chain"].to_list() == rows["chain"].to_list()
    assert (trained / PICTURE).stat().st_size > 10_000
    before, runs = stages(trained), f"paths.runs={trained.parent}"
    capsys.readouterr()
    again = train(composed("experiment=quickstart", *DIGITS, *TINY, "chain='fold@0.5 > repair > tune'", runs))
    assert again == trained, "another chain is no other training"
    after = stages(trained)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    shown = capsys.readouterr().out
    assert "is done already" in shown
    assert re.search(r"fold@0\.5.*\n.*> repair", shown)
    assert "failed" not in shown


def test_a_checkpoint_goes_through_chains_alone(trained, tmp_path, capsys):
    of = [f"checkpoint={trained / 'last.ckpt'}", "data=digits", "model=resnet18", f"paths.runs={tmp_path}", *DIGITS]
    several = "chains={low:[{fold:{ratio:0.5}},repair,{quantize:{bits:4}}],other:[{prune:{method:l1,ratio:0.25}}]}"
    folder = compress(composed_compress(*of, several))
    rows = read(folder / CHAIN_ROWS)
    assert set(rows["status"]) == {"ok"}
    assert len(rows) == 5
    assert read_record(folder)["state"] == "done"
    assert not (folder / "rows.parquet").exists()
    assert "quantize(bits=4)" in capsys.readouterr().out
    done = stages(folder)
    assert compress(composed_compress(*of, "chain='fold@0.5 > repair'")) == folder
    assert stages(folder) == done
    assert cell_of(composed_compress(*of)) != folder.name, "a grid of methods is another cell"


def test_a_chain_that_cannot_be_is_refused_before_the_training(tmp_path):
    for chain, message in {
        "chain='quantize(bits=4) > tune'": "tune cannot follow quantize",
        "chain='distil(teacher=/nowhere.pt)'": r"no checkpoint /nowhere\.pt",
        "chain='fold+protect=[layer9]@0.5'": "no group's name begins with 'layer9'",
        "chains={a:[repair]}": None,
    }.items():
        config = composed("experiment=quickstart", *DIGITS, *TINY, chain, f"paths.runs={tmp_path / 'runs'}")
        if message is None:
            config["chain"] = "repair"
            message = "chain= is one chain and chains= are several; choose one"
        with pytest.raises(UserError, match=message):
            train(config)
    assert not (tmp_path / "runs").exists()


def test_the_command_line_needs_no_quotes_of_hydra():
    text = "mix+data@0.3 > repair > distil(epochs=5,teacher=a'b)"
    (said,) = quoted_chains([f"chain={text}"])
    assert chains_in(composed(said)).keys() == {text}
    assert expanded([f"chain={text}"]) == [said]
    assert quoted_chains(["chain=[repair]", "chains={a:[repair]}", "chain=null", "seed=3"]) == [
        "chain=[repair]", "chains={a:[repair]}", "chain=null", "seed=3"
    ]  # fmt: skip


def test_chains_that_are_typed_take_the_place_of_those_of_an_experiment():
    for typed in ("chains=[repair]", "chains={a: [repair]}", "chains=repair"):
        said = checked(quoted_chains(["experiment=fold_distil_quantize", typed]), "train")
        assert [list(map(str, chain)) for chain in chains_in(composed(*said)).values()] == [["repair"]]


def test_chains_leave_no_room_for_a_grid():
    with pytest.raises(UserError, match=r"leave predict= out"):
        expanded(["chain=repair", "compression.repair_size=64", "compression.predict=true"])
    with pytest.raises(UserError, match="chains come in the place of methods, ratios and stages; leave ratios= out"):
        expanded(["chain=repair", "ratios=[0.5]"])
