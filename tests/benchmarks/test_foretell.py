"""Correlations within recipes are those of made data."""

import numpy as np
import polars as pl
import pytest

from benchmarks.foretell import within


def made(slope: float, shared: float, recipes: int = 8, seeds: int = 5, seed: int = 0) -> pl.DataFrame:
    """fold follows the feature by `slope` within a recipe, and by `shared` over recipes; noise is N(0, 1)."""
    rng = np.random.default_rng(seed)
    recipe = np.repeat(np.arange(recipes), seeds)
    of_recipe, own = rng.normal(0, 3, recipes)[recipe], rng.normal(0, 1, recipes * seeds)
    fold = shared * of_recipe + slope * own + rng.normal(0, 1, recipes * seeds)
    return pl.DataFrame({"recipe": recipe, "feature": of_recipe + own, "fold": fold})


def test_what_recipes_share_is_no_correlation_within_them() -> None:
    r, low, high, p = within(made(slope=0.0, shared=5.0, seeds=50), "feature")
    assert low < 0 < high
    assert abs(r) < 0.15
    assert p > 0.05


def test_a_correlation_within_recipes_is_found_beside_the_opposite_one_over_recipes() -> None:
    r, low, _, p = within(made(slope=1.0, shared=-5.0, seeds=50), "feature")
    assert r == pytest.approx(2**-0.5, abs=0.08)
    assert low > 0
    assert p < 1e-6


def test_19_of_20_intervals_hold_the_true_correlation() -> None:
    found = [within(made(1.0, 2.0, seed=seed), "feature") for seed in range(400)]
    held = np.mean([low < 2**-0.5 < high for _, low, high, _ in found])
    assert 0.92 < held < 0.98
