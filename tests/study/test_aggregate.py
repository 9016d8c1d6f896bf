import numpy as np
import polars as pl
import pytest
from scipy.stats import trim_mean

from pipeline.study.aggregate import improvement, interquartile_mean, middle_mean, profiles
from pipeline.study.lines import Lines
from pipeline.tasks import METRICS


def sweep(values: dict[str, list[float]], recipes: list[str], metric: str = "acc", ratios=(0.5,)) -> Lines:
    """values: {method: of each cell}, the same at all ratios; base is 90."""
    cells = [f"c{i}" for i in range(len(recipes))]
    base = pl.DataFrame({"cell": cells, "base": [90.0] * len(cells)})
    kinds = {"fold": "fold", "mix": "mix"}
    methods = [
        {"cell": cell, "recipe": recipe, "stage": "raw", "ratio": ratio, "method": method, "value": value}
        | {"kind": kinds.get(method, "prune")}
        for method, column in values.items()
        for cell, recipe, value in zip(cells, recipes, column, strict=True)
        for ratio in ratios
        if value is not None
    ]
    return Lines(base, pl.DataFrame(methods), (), METRICS[metric])


def test_the_middle_mean_is_scipys_where_quartiles_cut_no_value():
    values = np.sort(np.random.default_rng(0).normal(size=16))
    assert middle_mean(values, np.ones(16)) == pytest.approx(trim_mean(values, 0.25))


def test_the_middle_mean_of_weights_is_that_of_repeated_values():
    values, weights = np.array([1.0, 2.0, 5.0, 9.0]), np.array([[3, 0, 4, 1], [1, 1, 1, 1]])
    assert middle_mean(values, weights)[0] == pytest.approx(middle_mean(np.repeat(values, weights[0]), np.ones(8)))
    assert middle_mean(values, weights)[1] == pytest.approx(3.5)


def test_a_broken_network_does_not_move_the_interquartile_mean():
    values = [float(v) for v in range(50, 62)]
    recipes = [f"r{i}" for i in range(12)]
    whole, broken = (interquartile_mean(sweep({"fold": v}, recipes), "raw", 0.5) for v in (values, [0.0, *values[1:]]))
    assert whole["value"][0] == broken["value"][0] == pytest.approx(55.5)
    assert whole["low"][0] < 55.5 < whole["high"][0]


def test_seeds_of_a_recipe_are_drawn_together():
    """Eight copies of each of four networks say no more than the four."""
    values = [50.0, 54.0, 57.0, 65.0]
    once = interquartile_mean(sweep({"fold": values}, list("abcd")), "raw", 0.5)
    copied = interquartile_mean(
        sweep({"fold": np.repeat(values, 8).tolist()}, np.repeat(list("abcd"), 8).tolist()), "raw", 0.5
    )
    assert once.select("value", "low", "high").row(0) == pytest.approx(copied.select("value", "low", "high").row(0))
    assert (copied["n"][0], copied["recipes"][0]) == (32, 4)


def test_one_recipe_has_no_interval():
    found = interquartile_mean(sweep({"fold": [1.0, 2.0]}, ["a", "a"]), "raw", 0.5)
    assert found.select("low", "high").row(0) == (None, None)


@pytest.mark.parametrize(("metric", "better"), [("acc", 1.0), ("perplexity", 0.0)])
def test_improvement_counts_networks_and_halves_ties_in_the_direction_of_the_metric(metric, better):
    found = improvement(
        sweep({"fold": [60.0] * 4, "l1": [50.0] * 4, "l2": [60.0] * 4}, list("abcd"), metric), "raw", 0.5
    )
    assert dict(found.select("other", "probability").iter_rows()) == {"l1": better, "l2": 0.5}


def test_improvement_is_over_networks_that_have_both():
    found = improvement(sweep({"mix": [60.0, None, 40.0], "l1": [50.0, 10.0, 50.0]}, list("abc")), "raw", 0.5)
    assert found.select("method", "probability", "n", "recipes").rows() == [("mix", 0.5, 2, 2)]


def test_a_profile_rises_to_one_and_is_a_share_of_networks():
    found = profiles(sweep({"fold": [80.0, 70.0, 60.0, 50.0], "l1": [40.0] * 4}, list("abcd")), "raw", 0.5)
    fold = found.filter(pl.col("method") == "fold")
    assert fold["share"].is_sorted()
    assert (fold["loss"][0], fold["loss"][-1], fold["share"][-1]) == (10, 50, 1)
    assert fold.filter(pl.col("loss") < 19.9)["share"].unique().to_list() == [0.25]
    assert (fold["low"] <= fold["share"]).all()
    assert found.filter(pl.col("method") == "l1", pl.col("loss") < 49.9)["share"].max() == 0


def test_the_area_is_from_the_uncompressed_network_to_the_largest_ratio():
    found = interquartile_mean(sweep({"fold": [50.0], "l1": [70.0]}, ["a"], ratios=(0.5, 1.0)), "raw", None)
    assert found["value"].to_list() == pytest.approx([0.5 * 70 + 0.5 * 50, 0.5 * 80 + 0.5 * 70])


def test_an_unknown_stage_is_an_empty_table():
    for function in (interquartile_mean, profiles, improvement):
        assert function(sweep({"fold": [1.0]}, ["a"]), "repaired", 0.5).is_empty()
