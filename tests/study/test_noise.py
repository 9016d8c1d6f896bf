import numpy as np
import pytest
from made_lines import lines_of

from pipeline.study.intervals import needed
from pipeline.study.noise import noise, reliability


def test_no_seeds_no_noise():
    assert noise(lines_of([{"lr": i, "fold": 1.0 * i} for i in range(4)], ("lr",)), "repaired", 0.5) is None


def test_spread_is_pooled_within_recipes_and_single_recipes_count_between():
    cells = [{"lr": 1, "seed": s, "fold": v} for s, v in enumerate((50.0, 52.0))]
    cells += [{"lr": 2, "seed": s, "fold": v} for s, v in enumerate((60.0, 62.0, 64.0))]
    cells += [{"lr": 3, "fold": 70.0}]
    found = noise(lines_of(cells, ("lr",)), "repaired", 0.5)["fold"]
    assert found.sd == pytest.approx(((2 + 8) / 3) ** 0.5)
    assert (found.recipes, found.cells, found.all_recipes) == (2, 5, 3)
    assert found.low < found.reliability < found.high
    assert found.needed == needed((2 * 10 / 3) ** 0.5)  # the difference of two networks


def test_reliability_is_one_without_noise_and_zero_without_recipes():
    rng = np.random.default_rng(0)
    recipes = rng.normal(size=(200, 1))
    for values, expected in ((recipes + 1e-6 * rng.normal(size=(200, 3)), 1), (rng.normal(size=(200, 3)), 0)):
        squares = ((values - values.mean(1, keepdims=True)) ** 2).sum(1)
        share, low, high = reliability(np.full(200, 3.0), values.mean(1), squares)
        assert share == pytest.approx(expected, abs=0.1)
        assert low <= share <= high


def test_the_interval_of_reliability_covers():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(1000):
        values = 0.7**0.5 * rng.normal(size=(12, 1)) + 0.3**0.5 * rng.normal(size=(12, 4))
        squares = ((values - values.mean(1, keepdims=True)) ** 2).sum(1)
        _, low, high = reliability(np.full(12, 4.0), values.mean(1), squares)
        hits.append(low <= 0.7 <= high)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_one_recipe_has_a_spread_and_no_reliability():
    cells = [{"lr": 1, "seed": s, "fold": 50.0 + s} for s in range(8)]
    found = noise(lines_of(cells, ("lr",)), "repaired", 0.5)["fold"]
    assert found.sd == pytest.approx(6**0.5)
    assert found.reliability is None
