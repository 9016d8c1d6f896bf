"""Sentences, word by word, and what is refused."""

import polars as pl
import pytest
from made_lines import grid, lines_of

from pipeline.study.claims import claims, weighed
from pipeline.study.effects import effects
from pipeline.study.interactions import interactions
from pipeline.study.lines import Lines
from pipeline.study.noise import noise

NINE = {"rho": (0.0, 0.05), "lr": tuple(range(1, 10))}
WIDE = {"rho": (0.0, 0.05), "l1": (0.0, 1e-5), "lr": tuple(range(1, 13))}


def jitter(*levels: float) -> float:
    """Between -1 and 1, from the levels alone."""
    return (sum(7919 * (i + 1) * hash(level) for i, level in enumerate(levels)) % 2001) / 1000 - 1


def said(found: Lines, metric_at: tuple[str, float] = ("repaired", 0.5)) -> list[str]:
    table, across = effects(found, *metric_at), interactions(found, *metric_at)
    return claims(table, across, noise(found, *metric_at), found.metric)


def about(found: Lines, subject: str) -> list[str]:
    return [sentence for sentence in said(found) if sentence.startswith(subject)]


def test_a_sure_effect_is_said_with_interval_n_both_stages_base_and_gap():
    def values(rho, lr):
        up = bool(rho)
        return {"fold": 60 + 4 * up + up * (lr % 2), "raw": 20 + 3.0 * up, "base": 90 + lr / 100, "prune": 50.0 + up}

    assert about(lines_of(grid(NINE, values), tuple(NINE)), "SAM")[0] == (
        "SAM (rho 0 to 0.05) raises the accuracy that folding leaves at half of the channels, repaired, by 4.6 ± 0.4 "
        "points (9 pairs; raw +3.0 ± 0.0; base +0.0 ± 0.0; lead over pruning +3.6 ± 0.4)."
    )


def test_an_effect_that_is_not_told_from_zero_asserts_nothing():
    def values(rho, lr):
        return {"fold": 60 + bool(rho) * (5 if lr % 2 else -4)}

    (sentence,) = about(lines_of(grid(NINE, values), tuple(NINE)), "SAM")
    assert "has no sure effect on the accuracy that folding leaves" in sentence
    assert "+1.0 ± 3.6 points (9 pairs;" in sentence
    assert sentence.endswith("; about 89 pairs would show one point.")


def test_fewer_than_eight_pairs_are_refused_whatever_they_show():
    levels = NINE | {"lr": tuple(range(1, 8))}
    found = lines_of(grid(levels, lambda rho, lr: {"fold": 60 + bool(rho) * (9 + lr / 2)}), tuple(levels))
    (sentence,) = about(found, "SAM")
    assert "n too small" in sentence
    assert "(7 pairs; about 7 pairs would show one point)" in sentence
    assert not any(claim.sure for claim in weighed(effects(found, "repaired", 0.5), across(found), found.metric))


def across(found: Lines) -> pl.DataFrame:
    return interactions(found, "repaired", 0.5)


def test_a_setting_of_many_single_pairs_is_refused_once():
    cells = [{"lr": 0.1 * i, "fold": 50.0 + i} for i in range(1, 30)]
    assert len(about(lines_of(cells, ("lr",)), "Learning rate")) == 1


def test_both_halves_are_said_where_a_sign_changes_and_never_the_mean():
    def values(rho, l1, lr):
        return {"fold": 60 + bool(rho) * (5 if l1 else -5) + jitter(rho, l1, lr)}

    (sentence,) = [s for s in about(lines_of(grid(WIDE, values), tuple(WIDE)), "SAM") if "lead" not in s[:60]]
    assert sentence.startswith(
        "SAM (rho 0 to 0.05) raises or lowers the accuracy that folding leaves at half of the channels, repaired, "
        "depending on l1: -"
    )
    assert "where l1=0 (12 pairs; base " in sentence
    assert "where l1=1e-05 (12 pairs; base " in sentence
    assert "24 pairs" not in sentence


def test_halves_of_fewer_than_eight_pairs_are_refused_with_what_their_sign_may_depend_on():
    def values(rho, l1, lr):
        return {"fold": 60 + bool(rho) * (5 if l1 else -5) + jitter(rho, l1, lr)}

    levels = WIDE | {"lr": (1, 2, 3, 4)}
    (sentence,) = about(lines_of(grid(levels, values), tuple(levels)), "SAM")
    assert "n too small for a word on the accuracy" in sentence
    assert sentence.endswith("its sign may depend on l1 (4 pairs where l1=0, 4 pairs where l1=1e-05).")


def test_an_effect_that_is_larger_in_one_half_is_said_with_both():
    def values(rho, l1, lr):
        return {"fold": 60 + bool(rho) * (8 if l1 else 2) + jitter(rho, l1, lr)}

    sentences = said(lines_of(grid(WIDE, values), tuple(WIDE)))
    (sentence,) = [s for s in sentences if "by an amount that depends on" in s]
    assert "where l1=0 (12 pairs; base " in sentence
    assert "(12 quadruples)" in sentence


@pytest.mark.parametrize(("shift", "verb", "judged"), [(20, "raises", "worse"), (-20, "lowers", "better")])
def test_a_perplexity_is_said_in_per_cent_and_less_is_better(shift, verb, judged):
    def values(rho, lr):
        return {"fold": 300 + bool(rho) * (shift + lr % 2), "prune": 350.0, "base": 300.0}

    sentence = about(lines_of(grid(NINE, values), tuple(NINE), "perplexity"), "SAM")[0]
    assert f"{verb} the perplexity that folding leaves at half of the channels, repaired, by " in sentence
    assert f", which is {judged} (9 pairs;" in sentence
    share = {20: "22.8% (22.3% to 23.3%)", -20: "17.7% (17.3% to 18.0%)"}[shift]
    assert f"by {share}" in sentence


def test_the_noise_comes_first():
    cells = [cell | {"seed": seed} for seed in (0, 1) for cell in grid(NINE, lambda rho, lr: {"fold": 60.0 + 5 * lr})]
    for cell in cells:
        cell["fold"] += cell["seed"] * 2
    first = said(lines_of(cells, tuple(NINE)))[0]
    assert first.startswith(
        "Networks that differ in their seed alone scatter: the accuracy that folding leaves by 1.4 points (recipes "
    )
    assert first.endswith(
        "18 recipes with several seeds, 36 networks); seeds alone ask for about 18 pairs to show one point."
    )
