from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from pipeline.study.lines import Lines
from pipeline.study.noise import noise
from pipeline.study.prediction import predictions, regret, tasks
from pipeline.tables import UserError
from pipeline.tasks import METRICS

RATES = (0.001, 0.01, 0.1, 1.0)
SETTINGS = ("lr", "decay")
RNG = np.random.default_rng(0)


def lines_of(fold: pl.Expr, gap: pl.Expr, seeds: int = 1, repeats: int = 4) -> Lines:
    """Four rates, two decays, `repeats` recipes that differ in what no setting says, and seeds; noise is N(0, 1)."""
    grid = [(lr, decay, i, s) for lr in RATES for decay in ("on", "off") for i in range(repeats) for s in range(seeds)]
    table = pl.DataFrame(grid, schema=["lr", "decay", "i", "seed"], orient="row")
    recipe = pl.format("lr={}, decay={}, {}", "lr", "decay", "i")
    table = table.with_columns(cell=pl.format("c{}", pl.int_range(pl.len())), recipe=recipe, stage=pl.lit("raw"))
    table = table.with_columns(ratio=pl.lit(0.5), base=pl.lit(RNG.normal(90, 1, len(table))))
    table = table.with_columns(noise=pl.lit(RNG.normal(0, 1, len(table))), rate=pl.col("lr").log(10))
    table = table.with_columns(own=pl.col("noise").first().over("recipe"))
    return Lines(table.with_columns(fold=fold, prune=fold - gap, gap=gap), pl.DataFrame(), SETTINGS, METRICS["acc"])


def line(found: pl.DataFrame, **which: str) -> dict:
    return found.row(by_predicate=pl.all_horizontal(pl.col(k) == v for k, v in which.items()), named=True)


@pytest.fixture(scope="module", autouse=True)
def few_trees() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.study.prediction.TREES", 10)
        yield


@pytest.fixture(scope="module")
def known(few_trees: None) -> tuple[Lines, pl.DataFrame]:
    """What folding leaves follows the rate, where there is decay; the gap is noise around 2."""
    follows = 50 + 10 * pl.col("rate") * (pl.col("decay") == "on") + 0.3 * pl.col("noise")
    found = lines_of(follows, 2 + pl.col("noise"))
    return found, predictions(found, "raw", 0.5)


def test_settings_that_decide_are_found_and_base_accuracy_that_does_not_is_not(
    known: tuple[Lines, pl.DataFrame],
) -> None:
    fold = {"target": "fold", "held_out": "recipe"}
    assert line(known[1], features="settings", model="ridge", **fold)["r2"] > 0.95
    assert line(known[1], features="settings", model="forest", **fold)["r2"] > 0.9
    assert line(known[1], features="base", model="ridge", **fold)["r2"] < 0.3
    assert line(known[1], features="none", model="mean", **fold)["r2"] <= 0


def test_noise_is_not_foretold(known: tuple[Lines, pl.DataFrame]) -> None:
    gaps = known[1].filter((pl.col("target") == "gap") & (pl.col("model") != "always fold"))
    assert gaps["r2"].max() < 0.3


def test_always_fold_stands_beside_every_choice(known: tuple[Lines, pl.DataFrame]) -> None:
    found, table = known
    always = table.filter(pl.col("model") == "always fold")
    lost = (-found.table["gap"]).clip(0).mean()
    assert set(always["held_out"]) == {"recipe", *SETTINGS}
    assert always["regret"].to_list() == pytest.approx([lost] * 3)
    assert table.filter(pl.col("target") == "fold")["regret"].null_count() == len(table) - len(
        table.filter(pl.col("target") == "gap")
    )


def test_a_choice_by_the_true_sign_loses_nothing_and_by_the_wrong_one_all() -> None:
    gap = np.array([3.0, -1.0, 0.5, -2.0])
    assert regret(gap, gap) == 0
    assert regret(gap, -gap) == pytest.approx(np.abs(gap).mean())


def test_a_level_is_held_out_whole(known: tuple[Lines, pl.DataFrame]) -> None:
    found, table = known
    (rate,) = (task for task in tasks(found.table, "fold", SETTINGS) if task.held_out == "lr")
    assert rate.folds == len(RATES)
    assert pl.DataFrame({"lr": found.table["lr"], "group": rate.groups}).unique().height == len(RATES)
    # A forest cannot reach beyond the rates that it saw, and so does worse on a whole level than on single recipes.
    forest = {"target": "fold", "features": "settings", "model": "forest"}
    assert line(table, held_out="lr", **forest)["r2"] < line(table, held_out="recipe", **forest)["r2"] - 0.1


def test_seeds_of_a_recipe_never_stand_on_both_sides() -> None:
    # Every recipe has a value of its own that `key` tells; a seed of the same recipe among the others would betray it.
    found = lines_of(50 + 10 * pl.col("own"), pl.col("noise"), seeds=2)
    key = found.table.select("cell", key=pl.col("recipe").rank("dense").cast(pl.Float64).hash(7) % 1000)
    table = predictions(found, "raw", 0.5, key.with_columns(pl.col("key").cast(pl.Float64)))
    assert line(table, target="fold", held_out="recipe", features="extra", model="forest")["r2"] < 0.3
    assert table["ceiling"][0] == noise(found, "raw", 0.5)["fold"].reliability == 1


def test_extra_columns_help_where_they_tell_and_networks_without_them_are_left_out() -> None:
    found = lines_of(50 + 10 * pl.col("noise"), pl.col("rate"))
    extra = found.table.select("cell", pl.col("noise").alias("tells")).with_columns(
        tells=pl.when(pl.col("cell") != "c3").then("tells")
    )
    table = predictions(found, "raw", 0.5, extra)
    best = line(table, target="fold", held_out="recipe", features="extra", model="ridge")
    assert best["r2"] > 0.95
    assert line(table, target="fold", held_out="recipe", features="settings", model="ridge")["r2"] < 0.3
    assert set(table["n"]) == {31}
    assert table["ceiling"].null_count() == len(table)  # no recipe has two seeds


def test_too_few_recipes_are_refused() -> None:
    found = lines_of(pl.col("rate"), pl.col("rate"), repeats=2)
    with pytest.raises(UserError, match="16 recipes have all features; prediction needs 20"):
        predictions(found, "raw", 0.5)


def test_a_level_that_nobody_else_has_is_foretold_without_its_setting() -> None:
    found = lines_of(50 + 10 * pl.col("rate") + 0.3 * pl.col("noise"), pl.col("rate"))
    tiny = pl.when(pl.col("decay") == "on").then(1e-5).otherwise(0.0)
    table = predictions(replace(found, table=found.table.with_columns(decay=tiny)), "raw", 0.5)
    # Decay does nothing here, so that the rate tells all of a level that was never seen.
    held_out = table.filter((pl.col("held_out") == "decay") & (pl.col("features") == "settings"))
    assert held_out.filter(pl.col("target") == "fold")["r2"].min() > 0.9
