"""Rows are typed, whole, and add up."""

import math

import polars as pl
import pytest

from pipeline.results import KEY, SCHEMA, Row, RowStore, foldability, pivot, read, table


def row(epoch: int = 1, method: str = "fold", ratio: float = 0.5, acc: float | None = 0.75, **more) -> Row:
    fixed = {"cell": "c", "model": "m", "data": "d", "seed": 0, "step": 10, "stage": "raw", "split": "val", "n": 8}
    return Row(**{**fixed, "epoch": epoch, "method": method, "ratio": ratio, "acc": acc, **more})


def test_a_file_gives_back_what_was_written(tmp_path):
    store = RowStore(tmp_path / "new" / "rows.parquet")
    store.add([row(), row(ratio=0.25, acc=None, status="failed", reason="why")])
    store.write()
    back = read(tmp_path / "new" / "rows.parquet")
    assert back.equals(store.rows)
    assert back.schema == pl.Schema(SCHEMA)
    assert [Row(**values) for values in back.to_dicts()] == [
        row(),
        row(ratio=0.25, acc=None, status="failed", reason="why"),
    ]


def test_no_row_twice_and_the_later_one_counts(tmp_path):
    store = RowStore(tmp_path / "rows.parquet")
    store.add([row(acc=0.1), row(epoch=2)])
    store.add([row(acc=0.2)])
    assert sorted(store.rows["acc"]) == [0.2, 0.75]
    assert not store.rows.select(KEY).is_duplicated().any()


def test_truncate_forgets_later_epochs():
    store = RowStore()
    store.add([row(epoch=1), row(epoch=2), row(epoch=3)])
    store.truncate(2)
    assert store.rows["epoch"].to_list() == [1, 2]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    store = RowStore(path)
    store.add([row()])
    store.write()
    store.add([row(epoch=2)])

    def half(self, file):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(pl.DataFrame, "write_parquet", half)
        with pytest.raises(OSError, match="No space left"):
            store.write()
    assert read(path)["epoch"].to_list() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]
    store.write()
    assert read(path)["epoch"].to_list() == [1, 2]


def test_pivot_has_a_column_per_ratio_and_leaves_failures_out():
    rows = table([row(), row(ratio=0.25, acc=0.9), row(method="l1", status="failed"), row(method="dense", ratio=0.0)])
    assert pivot(rows).to_dicts() == [{"stage": "raw", "method": "fold", "0.25": 0.9, "0.5": 0.75}]


@pytest.mark.parametrize(
    ("dense", "curve", "area"),
    [
        (0.9, {}, 0.9),
        (0.8, {0.5: 0.8, 0.9: 0.8}, 0.8),
        (1.0, {0.5: 0.0}, 0.5),
        (1.0, {0.8: 0.2, 0.2: 1.0}, (0.2 * 1.0 + 0.6 * 0.6) / 0.8),
    ],
)
def test_foldability_is_the_mean_height_of_the_curve(dense, curve, area):
    assert foldability(dense, curve) == pytest.approx(area)


def test_foldability_of_a_broken_curve_is_nan():
    assert math.isnan(foldability(0.9, {0.5: math.nan}))
