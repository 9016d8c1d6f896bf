"""The state of a cell survives kills, rivals and damage; settings become one table."""

import json
import subprocess
import sys

import polars as pl
import pytest

from pipeline.cells import RECORD, Busy, as_table, cells, flat, held, is_held, read_record, settings, write_record
from pipeline.tables import UserError

HOLD = """
import sys
from pathlib import Path
from pipeline.cells import held, write_record
folder = Path(sys.argv[1])
with held(folder):
    write_record(folder, {"seed": 1}, "running")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_cell_runs_while_it_is_held_and_is_broken_once_its_process_was_killed(tmp_path):
    folder = tmp_path / "cell"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rival:
        try:
            assert rival.stdout.readline() == b"held\n"
            assert is_held(folder)
            assert read_record(folder)["state"] == "running"
            with pytest.raises(Busy, match="cell is being run by another process"), held(folder):
                pass
        finally:
            rival.kill()
    assert not is_held(folder)
    assert read_record(folder)["state"] == "broken"
    with held(folder):
        assert read_record(folder)["state"] == "running"


def test_a_record_is_given_back(tmp_path):
    assert read_record(tmp_path) is None
    write_record(tmp_path, {"optim": {"lr": 0.1}}, "failed", "no memory", 1.23456)
    expected = {"state": "failed", "reason": "no memory", "seconds": 1.235, "config": {"optim": {"lr": 0.1}}}
    assert read_record(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_a_lock_that_may_not_be_tried_is_believed(tmp_path, monkeypatch):
    with held(tmp_path):
        write_record(tmp_path, {}, "running")

    def refused(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipeline.cells.FileLock.acquire", refused)
    assert read_record(tmp_path)["state"] == "running"


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", json.dumps({"state": "done"}), "\udcff", '"text"'])
def test_a_damaged_record_is_named_and_does_not_hide_the_others(tmp_path, text):
    write_record(folder(tmp_path, "good"), {"seed": 1}, "done")
    (folder(tmp_path, "bad") / RECORD).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"bad/cell.json is damaged \(.*\); delete the folder"):
        read_record(tmp_path / "bad")
    table = settings(tmp_path)
    assert table.select("cell", "state", "seed").rows() == [("bad", "broken", None), ("good", "done", 1)]
    assert "damaged" in table["reason"][0]


def test_settings_have_a_column_each_with_the_names_of_the_command_line(tmp_path):
    optim = {"name": "sgd", "lr": 1, "sam": {"rho": 0.05}}
    write_record(folder(tmp_path, "a"), {"seed": 0, "optim": optim, "augment": ["crop", "flip"]}, "done", seconds=2)
    optim = {"name": "adam", "lr": 0.1, "sam": None}
    write_record(folder(tmp_path, "b"), {"seed": 1, "optim": optim, "precision": "16"}, "failed", "why")
    write_record(folder(tmp_path, "c"), {"precision": 32}, "done")
    (tmp_path / "no cell").mkdir()
    (tmp_path / "file").touch()
    assert [path.name for path in cells(tmp_path)] == ["a", "b", "c"]
    table = settings(tmp_path).drop("seconds", "reason", "cell", "state")
    assert table.to_dict(as_series=False) == {
        "seed": [0, 1, None],
        "optim.name": ["sgd", "adam", None],
        "optim.lr": [1.0, 0.1, None],
        "optim.sam.rho": [0.05, None, None],
        "augment": ['["crop", "flip"]', None, None],
        "optim.sam": [None, None, None],
        "precision": [None, "16", "32"],
    }
    assert table["optim.lr"].dtype == pl.Float64


def test_no_cells_are_an_empty_table_and_no_folder_is_an_error(tmp_path):
    assert settings(tmp_path).columns == as_table([]).columns == ["cell", "state", "reason", "seconds"]
    assert settings(tmp_path).is_empty()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=f"{path.name} is not a folder of runs"):
            cells(path)


def test_flat_keeps_lists_of_any_depth_as_json():
    assert flat({"a": {"b": [1, [2, None]], "c": {}}, "d": None}) == {"a.b": "[1, [2, null]]", "d": None}


def folder(root, name):
    (root / name).mkdir()
    return root / name
