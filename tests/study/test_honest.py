"""Intervals cover and sentences are true on made sweeps (benchmarks/honesty.py has all worlds and more draws)."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import binom

from benchmarks.honesty import WORLDS, World, verdict
from pipeline.study.intervals import summary
from pipeline.study.matching import design

DRAWS = 1000
FEW = 60  # draws that go the whole way to the sentences, in the default tests


@pytest.mark.parametrize("name", ["nothing", "effects", "heavy tails", "missing, nested, three levels", "seeds"])
def test_intervals_over_matched_pairs_cover_in_93_to_97_of_100_draws(name):
    """All draws at once: each is a column of values over the same design."""
    world = WORLDS[name]
    for setting, hits in covered(world).items():
        assert 0.93 <= hits.mean() <= 0.97, setting


def covered(world: World) -> dict[str, np.ndarray]:
    """{step of a setting: (DRAWS,) does the interval of fold hold the truth?}"""
    rng = np.random.default_rng(0)
    table = world.draw(rng).table.select("cell", *world.levels)
    values = {f"{i}": world.draw(rng).table["fold"] for i in range(DRAWS)}
    made = design(table.with_columns(**values), tuple(world.levels), list(values))
    exact = design(world.truth.table, tuple(world.levels), ["fold"])
    assert (made.codes == exact.codes).all()
    found = {}
    for setting, name in enumerate(made.settings):
        for low, high in made.steps(setting):
            lows, highs = made.matched(setting, low, high)
            every = summary(made.values[highs] - made.values[lows])
            truth = (exact.values[highs] - exact.values[lows]).mean()
            found[f"{name} {low} {high}"] = np.abs(every.mean - truth) <= every.half
    return found


@pytest.mark.parametrize("name", ["nothing", "effects", "seeds", "an effect in one half"])
def test_false_sentences_are_rare(name):
    """No more than chance allows (1 in 1,000) where 5% of the draws have one."""
    found = verdict(WORLDS[name], FEW)
    assert found.false <= binom.isf(0.001, FEW, 0.05) / FEW
    assert found.covered["effects"] > 0.9


def test_a_change_of_sign_is_said_by_halves_and_never_as_a_mean():
    found = verdict(WORLDS["a sign that changes"], FEW)
    assert found.flips > 0.4
    assert found.means == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WORLDS))
def test_all_worlds_are_honest_in_a_thousand_draws(name):
    found = verdict(WORLDS[name], DRAWS)
    assert found.false < 0.05
    assert 0.93 <= found.covered["effects"] <= 0.97
    assert 0.93 <= found.covered["differences"] <= 0.97
    assert found.means == 0


def test_a_world_has_the_effects_that_it_was_told():
    world = WORLDS["an effect in one half"]
    table = world.truth.table.with_columns(pl.col("fold") - 60)
    assert table.filter(a=1, b=1, c=0)["fold"].unique().to_list() == [6]
    assert table.filter(a=0, c=1, d=1)["fold"].unique().to_list() == [-6]
