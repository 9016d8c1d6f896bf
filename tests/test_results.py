"""Rows are typed, whole, and add up."""

import math
import threading

import polars as pl
import pytest

from pipeline.results import KEY, SCHEMA, Row, RowStore, foldability, means, read, read_present, table


def row(epoch: int = 1, method: str = "fold", ratio: float = 0.5, acc: float | None = 0.75, **more) -> Row:
    fixed = {"cell": "c", "model": "m", "data": "d", "seed": 0, "step": 10, "stage": "raw", "split": "val", "n": 8}
    fixed["kind"] = "fold"
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


def test_means_are_over_cells_by_stage_method_and_ratio_without_what_failed():
    lines = [
        row(method="l1", stage="repaired", acc=0.3),
        row(ratio=0.75, acc=0.5),
        row(ratio=0.25, acc=0.9),
        row(ratio=0.25, acc=0.5, cell="d"),
        row(ratio=0.25, acc=math.nan, cell="e"),
        row(method="l2", status="failed", acc=None),
        row(method="dense", ratio=0.0),
    ]
    assert means(table(lines)).rows() == [
        ("raw", "fold", 0.25, pytest.approx(0.7), 2),
        ("raw", "fold", 0.75, 0.5, 1),
        ("repaired", "l1", 0.5, 0.3, 1),
    ]


def test_many_files_are_read_as_one_without_those_that_are_absent_or_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.results.BATCH", 2)
    paths = [tmp_path / f"{i}.parquet" for i in range(7)]
    for i, path in enumerate(paths):
        store = RowStore(path)
        store.add([row(cell=f"c{i}"), row(cell=f"c{i}", ratio=0.25)])
        store.write()
    paths[1].unlink()
    paths[3].write_bytes(paths[3].read_bytes()[:-20])
    paths[4].write_bytes(b"")
    pl.DataFrame({"other": [1]}).write_parquet(paths[5])
    warned = []
    rows = read_present(paths, ["cell", "acc"], warned.append)
    assert rows.columns == ["cell", "acc"]
    assert rows["cell"].to_list() == ["c0", "c0", "c2", "c2", "c6", "c6"]
    assert [message.split(" ")[0] for message in warned] == [str(paths[i]) for i in (3, 4, 5)]
    assert read(paths[0], paths[2]).equals(read_present([paths[0], paths[2]]))
    assert read_present([]).equals(table([]))


def test_files_that_are_replaced_meanwhile_are_read_whole(tmp_path):
    stores = [RowStore(tmp_path / f"{i}" / "rows.parquet") for i in range(4)]
    stop = threading.Event()

    def write():
        epoch = 0
        while not stop.is_set():
            epoch += 1
            for store in stores:
                store.add([row(cell=store.path.parent.name, epoch=epoch)])
                store.write()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            rows = read_present([store.path for store in stores], warn=pytest.fail)
            for _, part in rows.group_by("cell"):
                assert part["epoch"].to_list() == list(range(1, len(part) + 1))
    finally:
        stop.set()
        writer.join()


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


def test_a_file_of_before_a_column_was_there_reads_as_none(tmp_path):
    store = RowStore(tmp_path / "rows.parquet")
    store.add([row(cell="c")])
    store.rows.drop("fidelity").write_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet")["fidelity"].to_list() == [None]
