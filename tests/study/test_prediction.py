from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from pipeline.study.lines import Lines
from pipeline.study.noise import noise
from pipeline.study.prediction import Asked, Task, intervals, prediction, predictions, regret, tasks
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


def test_intervals_hold_the_scores_and_narrow_with_more_recipes(known: tuple[Lines, pl.DataFrame]) -> None:
    told = known[1].filter(pl.col("model") != "always fold")
    for name in ("r2", "mae"):
        assert (told[f"{name}_low"] <= told[name] + 1e-9).all()
        assert (told[f"{name}_high"] >= told[name] - 1e-9).all()
    rng = np.random.default_rng(1)

    def width(recipes: int, seeds: int) -> float:
        y = rng.normal(0, 3, recipes * seeds)
        task = Task("fold", "recipe", y, np.arange(len(y)), np.arange(len(y)) // seeds)
        found = intervals(task, y + rng.normal(0, 1, len(y)))
        return found["mae_high"] - found["mae_low"]

    assert width(400, 1) == pytest.approx(width(25, 1) / 4, rel=0.4)


def test_seeds_of_a_recipe_that_err_alike_do_not_narrow_an_interval() -> None:
    rng = np.random.default_rng(0)
    y, off = rng.normal(0, 3, 40), rng.normal(0, 1, 40)
    once = intervals(Task("fold", "recipe", y, np.arange(40), np.arange(40)), y + off)
    twice = [np.repeat(values, 2) for values in (y, off, np.arange(40))]
    again = intervals(Task("fold", "recipe", twice[0], twice[2], twice[2]), twice[0] + twice[1])
    assert again == pytest.approx(once)


def test_nine_of_ten_intervals_or_more_hold_the_true_error() -> None:
    """200 draws of 60 recipes; a bootstrap of few recipes is a little narrow."""
    rng = np.random.default_rng(0)
    truth, held = np.sqrt(2 / np.pi), 0
    for _ in range(200):
        y = rng.normal(0, 3, 60)
        found = intervals(Task("fold", "recipe", y, np.arange(60), np.arange(60)), y + rng.normal(0, 1, 60))
        held += found["mae_low"] < truth < found["mae_high"]
    assert 0.90 < held / 200 < 0.98


def test_more_features_than_networks_are_read_without_their_products() -> None:
    found = lines_of(50 + 10 * pl.col("noise"), pl.col("rate"))
    several = {f"x{i}": pl.lit(RNG.normal(0, 1, len(found.table))) for i in range(12)}
    extra = found.table.select("cell", tells=pl.col("noise"), **several)
    table = predictions(found, "raw", 0.5, extra)
    best = line(table, target="fold", held_out="recipe", features="extra", model="ridge")
    assert best["r2"] > 0.9


def test_what_was_said_of_each_network_stands_beside_its_score(known: tuple[Lines, pl.DataFrame]) -> None:
    made = prediction(known[0], "raw", 0.5, asked=Asked(("ridge",), levels=False))
    assert set(made.table["model"]) == {"mean", "always fold", "ridge"}
    assert set(made.table["held_out"]) == {"recipe"}
    for of, said in made.lines:
        if said is not None:
            off = made.cells[of["target"]].to_numpy() - said
            assert np.abs(off).mean() == pytest.approx(of["mae"])


def test_a_feature_named_like_a_column_is_a_feature() -> None:
    found = lines_of(50 + 10 * pl.col("noise"), pl.col("rate"))
    extra = found.table.select("cell", pl.col("noise").alias("base"))
    table = predictions(found, "raw", 0.5, extra)
    assert line(table, target="fold", held_out="recipe", features="extra", model="ridge")["r2"] > 0.95
    assert line(table, target="fold", held_out="recipe", features="base", model="ridge")["r2"] < 0.3
