"""Effects, noise and intervals are those of made data."""

import numpy as np
import polars as pl
import pytest

from benchmarks import evidence
from benchmarks.seeds import FACTORIALS, RECIPES, contrast, contrasts, effect
from pipeline.tables import UserError

SAM_L1 = FACTORIALS[0]


def made(effects: dict[tuple[bool, bool], float], seeds: int = 4, noise: float = 0.0, shared: float = 0.0):
    """Lines of a factorial: fold is the effect of a recipe, plus noise of a network, plus noise that a seed shares."""
    rng = np.random.default_rng(0)
    lines = []
    for seed in range(seeds):
        of_seed = shared * rng.standard_normal()
        for (rho, l1), value in effects.items():
            fold = value + of_seed + noise * rng.standard_normal()
            levels = {"rho": 0.1 * rho, "l1": 1e-4 * l1}
            lines.append({"seed": seed, "recipe": f"{levels}", **levels, "fold": fold, "stage": "raw", "ratio": 0.5})
    return pl.DataFrame(lines)


KNOWN = {(False, False): 40.0, (True, False): 41.0, (False, True): 38.0, (True, True): 46.0}


def test_contrasts_find_effects_and_the_interaction_and_noise_of_seeds_cancels():
    table = made(KNOWN, shared=20.0)
    found = {name: effect(table, SAM_L1, signs, "fold") for name, signs in contrasts(SAM_L1).items()}
    values = [1.0, 8.0, -2.0, 5.0, 7.0]
    assert [value for value, _ in found.values()] == pytest.approx(values)
    assert all(half < 1e-9 for _, half in found.values())


@pytest.mark.parametrize("name", ["SAM, L1 0", "their interaction"])
def test_intervals_hold_the_true_effect_in_95_of_100_draws(name):
    """4,000 draws of four seeds: the share is within three standard errors, ± 1.04%."""
    rng = np.random.default_rng(0)
    signs = np.array([contrasts(SAM_L1)[name].get(recipe, 0) for recipe in RECIPES])
    truth = np.array([KNOWN[recipe] for recipe in RECIPES])
    blocks, noise = 5 * rng.standard_normal((4000, 4, 1)), 2 * rng.standard_normal((4000, 4, 4))
    found = [contrast(one, signs) for one in truth + blocks + noise]
    covered = np.mean([abs(value - truth @ signs) < half for value, half in found])
    assert covered == pytest.approx(0.95, abs=0.0104)


def test_seeds_that_lack_a_recipe_are_left_out_and_one_seed_is_too_few():
    table = made(KNOWN, seeds=3)
    more = table.filter((pl.col("seed") < 2) | (pl.col("rho") == 0)).with_columns(
        fold=pl.when(pl.col("seed") == 2).then(1000.0).otherwise("fold")
    )
    assert effect(more, SAM_L1, contrasts(SAM_L1)["SAM, L1 0"], "fold")[0] == pytest.approx(1.0)
    with pytest.raises(UserError, match="1 seeds have all four recipes; two are needed"):
        effect(table.filter(pl.col("seed") == 0), SAM_L1, contrasts(SAM_L1)["SAM, L1 0"], "fold")


def test_a_recipe_that_lacks_a_line_is_left_out_of_that_ratio():
    facts = {"model": "net", "stage": "raw", "pictures": "none", "statistics": "none", "acc": 1.0, "dense": 90.0}
    there = [("a", "fold", 0.5), ("a", "l1", 0.5), ("b", "fold", 0.5), ("b", "fold", 0.3)]
    table = pl.DataFrame([{**facts, "recipe": r, "method": m, "ratio": ratio} for r, m, ratio in there])
    found = evidence.whole(table)
    assert list(found.select("recipe", "method", "ratio").iter_rows()) == [
        ("a", "fold", 0.5),
        ("a", "l1", 0.5),
        ("b", "fold", 0.3),
    ]


def test_seeds_of_one_recipe_count_once():
    """Four seeds of one recipe and one of each of two others: n is 3, and the recipe of four seeds weighs as one."""
    lines = [("a", 10.0)] * 4 + [("b", 20.0), ("c", 60.0)]
    facts = {"model": "net", "method": "fold", "stage": "raw", "ratio": 0.5, "pictures": "none", "statistics": "none"}
    table = pl.DataFrame([{**facts, "recipe": recipe, "acc": acc, "dense": 90.0} for recipe, acc in lines])
    assert evidence.interval(evidence.by_recipe(evidence.of(table, "fold", "raw"))) == "30.0 ± 65.7"


def test_a_difference_is_between_methods_on_one_network():
    """A seed that only one of both was measured on would make the difference one of seeds."""
    lines = [("a0", "a", "fold", 5.0), ("a0", "a", "l1", 3.0), ("a1", "a", "l1", 90.0), ("b0", "b", "fold", 8.0)]
    lines += [("b0", "b", "l1", 1.0), ("b1", "b", "fold", 6.0), ("b1", "b", "l1", 3.0)]
    keys = ["network", "recipe", "method", "acc"]
    table = pl.DataFrame([dict(zip(keys, line, strict=True)) for line in lines])
    table = table.with_columns(pl.lit("net").alias("model"), pl.lit("raw").alias("stage"), pl.lit(0.5).alias("ratio"))
    assert evidence.difference(table, ("fold", "raw"), ("l1", "raw")).to_list() == [2.0, 5.0]
