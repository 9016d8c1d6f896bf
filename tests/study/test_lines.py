import dataclasses
import math

import polars as pl
import pytest

from pipeline.results import Row, table
from pipeline.study.answer import answer
from pipeline.study.lines import lines
from pipeline.study.sweep import Sweep, joined, load
from pipeline.tables import UserError

CONTEXT = {"model": "toy", "data": "digits", "seed": 0, "epoch": 1, "step": 10, "split": "val"}


def rows_of(cell: str, dense: float, fold: float, prune: float, metric: str = "acc") -> list[Row]:
    def row(method: str, ratio: float, value: float) -> Row:
        kind = {"dense": "dense", "fold": "fold"}.get(method, "prune")
        about = {"kind": kind, "calibration": "none", "sizes": "uniform", "statistics": "none", "metric": metric}
        return Row(cell, **CONTEXT, method=method, ratio=ratio, stage="raw", **about, **{metric: value})

    return [
        row("dense", 0.0, dense),
        row("fold", 0.5, fold),
        row("l1", 0.5, prune),
        row("l2", 0.5, prune - 0.1 if metric == "acc" else prune + 1),
    ]


def sweep_of(rows: list[Row]) -> Sweep:
    cells = pl.DataFrame(
        [
            {"cell": "a", "state": "done", "reason": "", "seconds": 1.0, "optim.lr": 0.1, "seed": 0},
            {"cell": "b", "state": "done", "reason": "", "seconds": 1.0, "optim.lr": 0.1, "seed": 1},
            {"cell": "c", "state": "done", "reason": "", "seconds": 1.0, "optim.lr": 0.01, "seed": 0},
            {"cell": "d", "state": "failed", "reason": "", "seconds": 1.0, "optim.lr": 0.001, "seed": 0},
        ]
    )
    return Sweep(cells, table(rows))


SWEEP = sweep_of([*rows_of("a", 0.9, 0.7, 0.5), *rows_of("b", 0.8, 0.6, 0.6), *rows_of("c", 0.9, 0.4, 0.5)])


def test_cells_of_one_recipe_differ_in_their_seed_alone() -> None:
    found = lines(SWEEP)
    assert found.settings == ("lr",)
    assert found.recipes == 2
    at = found.at("raw", 0.5).sort("cell")
    assert at["recipe"].to_list() == ["lr=0.1", "lr=0.1", "lr=0.01"]
    assert at["seed"].to_list() == [0, 1, 0]


@pytest.mark.parametrize(("metric", "known", "unlearned"), [("acc", 0.9, 0.1), ("perplexity", 40.0, 512.0)])
def test_networks_that_learned_nothing_are_counted_in_the_answer(metric, known, unlearned) -> None:
    def answered(*dense: float) -> tuple[tuple[str, ...], str]:
        rows = [row for cell, value in zip("abc", dense, strict=True) for row in rows_of(cell, value, 0.3, 0.2, metric)]
        level = 512.0 if metric == "perplexity" else None  # accuracy: rows of before the column, on ten digits
        found = lines(sweep_of([dataclasses.replace(row, chance=level) for row in rows]))
        return found.blind, answer(found)[0]

    usual = "3 networks of 2 recipes were measured; they differ in lr."
    assert answered(known, known, known) == ((), usual)
    assert answered(known, unlearned, known) == (
        ("b",),
        f"{usual} 1 of them is no better than chance uncompressed, and in every mean.",
    )
    assert answered(unlearned, unlearned, known)[1].endswith(
        " 2 of them are no better than chance uncompressed, and in every mean."
    )


def test_values_are_points_and_the_gap_is_the_lead_over_the_best_pruning() -> None:
    at = lines(SWEEP).at("raw", 0.5).sort("cell")
    for name, values in {
        "base": [90, 80, 90],
        "fold": [70, 60, 40],
        "prune": [50, 60, 50],
        "gap": [20, 0, -10],
    }.items():
        assert at[name].to_list() == pytest.approx(values)


def test_the_line_without_a_ratio_is_the_area_under_the_curve() -> None:
    at = lines(SWEEP).at("raw", None).sort("cell")
    assert at["fold"].to_list() == pytest.approx([80, 70, 65])
    assert at["gap"].to_list() == pytest.approx([10, 0, -5])


def test_a_perplexity_is_compared_by_its_logarithm_and_less_is_better() -> None:
    rows = [row for cell in "abc" for row in rows_of(cell, 10.0, 20.0, 30.0, "perplexity")]
    found = lines(sweep_of(rows))
    at = found.at("raw", 0.5)
    assert at["fold"].to_list() == pytest.approx([100 * math.log(20)] * 3)
    assert at["gap"].to_list() == pytest.approx([100 * math.log(1.5)] * 3)
    assert found.at("raw", None)["gap"].to_list() == pytest.approx([50 * math.log(1.5)] * 3)


def test_settings_that_a_checkpoint_was_trained_with_tell_recipes_apart() -> None:
    """ "named.optim.lr" begins like "name", which is no setting of a recipe; the seed of training is the seed."""
    trained = {"named.optim.lr": [0.1, 0.1, 0.01, 0.1], "named.seed": [3, 4, 3, 3], "named.name": ["a", "b", "c", "d"]}
    cells = SWEEP.cells.drop("optim.lr").with_columns(pl.Series(k, v) for k, v in trained.items())
    found = lines(Sweep(cells, SWEEP.rows))
    assert found.settings == ("lr",)
    assert found.at("raw", 0.5).sort("cell").select("recipe", "seed").rows() == [
        ("lr=0.1", 3),
        ("lr=0.1", 4),
        ("lr=0.01", 3),
    ]


def test_a_sweep_comes_back_from_one_file(tmp_path) -> None:
    joined(SWEEP).write_parquet(tmp_path / "rows.parquet")
    again = lines(load(tmp_path / "rows.parquet"))
    assert again.table.sort("cell", "ratio").equals(lines(SWEEP).table.sort("cell", "ratio"))


def test_a_sweep_without_rows_is_refused() -> None:
    with pytest.raises(UserError, match="no cell that is done has rows yet"):
        lines(sweep_of([]))
