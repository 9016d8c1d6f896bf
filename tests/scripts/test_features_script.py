"""Features of trained cells as users ask for them: a column each beside the cells, computed once."""

import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from composing import composed

import scripts.features
from pipeline.cells import write_record
from pipeline.study.sweep import FEATURES
from scripts.build_data import build_data
from scripts.build_training import build_task

TINY = ["experiment=quickstart", "model.width=4"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A cell with a network, one that failed and one whose network is gone."""
    config = composed(*TINY, f"paths.runs={tmp_path}")
    for cell, state in (("a-1", "done"), ("b-2", "failed"), ("c-3", "done")):
        (tmp_path / cell).mkdir()
        write_record(tmp_path / cell, config, state)
    torch.manual_seed(0)
    task = build_task(config, build_data(config))
    torch.save({"state_dict": task.state_dict()}, tmp_path / "a-1" / "last.ckpt")
    return tmp_path


def test_features_of_done_cells_are_written_once_and_others_are_told(runs: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["features", str(runs)])
    scripts.features.main()
    told = capsys.readouterr()
    assert "c-3 has no features: it kept no network" in told.err
    assert "b-2" not in told.out + told.err
    table = pl.read_parquet(runs / FEATURES)
    assert table["cell"].to_list() == ["a-1"]
    assert 0 < table["effective_rank"][0] < 1
    assert 0 <= table["fidelity_fold_50"][0] <= 1

    def refuse(*arguments: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(scripts.features, "features", refuse)
    scripts.features.main()
    assert pl.read_parquet(runs / FEATURES).equals(table)


def test_a_folder_without_cells_is_refused_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["features", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        scripts.features.main()
    assert "is not a folder of runs" in capsys.readouterr().err
