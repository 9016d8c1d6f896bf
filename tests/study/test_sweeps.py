"""Features of networks beside the cells of a sweep."""

from pathlib import Path

import polars as pl
import pytest

from pipeline.cells import write_record
from pipeline.results import ROWS, SCHEMA, Row, RowStore
from pipeline.study.sweep import FEATURES, Sweep, joined, load, separated

FOUND = {"cell": ["a-1", "b-2"], "height_50": [0.5, 0.25], "height_50/conv1": [0.1, 0.2]}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three cells, of which two have features."""
    for cell in ("a-1", "b-2", "c-3"):
        (tmp_path / cell).mkdir()
        write_record(tmp_path / cell, {"seed": 0, "optim": {"lr": 0.1}}, "done")
        store = RowStore(tmp_path / cell / ROWS)
        store.add([Row(cell, "m", "d", 0, 1, 1, "fold", 0.5, "raw", "test", acc=0.5)])
        store.write()
    pl.DataFrame(FOUND).write_parquet(tmp_path / FEATURES)
    return tmp_path


def test_features_stand_beside_the_cells_and_are_no_settings(runs: Path) -> None:
    sweep = load(runs)
    assert sweep.features.rows() == [("a-1", 0.5), ("b-2", 0.25), ("c-3", None)]
    assert sweep.settings == ["seed", "optim.lr"]
    assert sweep.differing() == []
    assert sweep.where(["optim.lr=0.1"]).features.equals(sweep.features)


def test_features_come_back_from_a_file_of_rows(runs: Path) -> None:
    sweep = load(runs, tuple(SCHEMA))
    again = separated(joined(sweep))
    assert again.features.sort("cell").equals(sweep.features)
    assert again.cells.sort("cell")["feature.height_50/conv1"].to_list() == [0.1, 0.2, None]


def test_a_sweep_without_the_file_has_no_features(runs: Path) -> None:
    (runs / FEATURES).unlink()
    assert load(runs).features is None


def test_a_damaged_file_is_told_and_the_cells_are_read(runs: Path) -> None:
    (runs / FEATURES).write_bytes(b"PAR1 not a table")
    told: list[str] = []
    assert load(runs, warn=told.append).features is None
    assert "features.parquet is damaged" in told[0]


def test_the_rows_of_done_cells_are_no_copy_where_all_are_done(runs: Path) -> None:
    sweep = load(runs)
    assert sweep.done_rows is sweep.rows
    half = Sweep(sweep.cells.with_columns(state=pl.Series(["done", "failed", "done"])), sweep.rows)
    assert half.done_rows["cell"].to_list() == ["a-1", "c-3"]
