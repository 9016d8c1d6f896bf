"""Matched pairs against numbers made by hand, and against a linear model."""

import time
import zlib

import numpy as np
import polars as pl
import pytest
from made_lines import grid, lines_of

from pipeline.study.effects import check, effects, pairs
from pipeline.tables import UserError


def noisy(**levels) -> dict[str, float]:
    rng = np.random.default_rng(zlib.crc32(repr(levels).encode()))
    return {name: 60 + rng.normal() for name in ("fold", "base", "prune")}


def line_of(table: pl.DataFrame, setting: str, outcome: str = "fold", **more) -> dict:
    found = table.filter(
        pl.col("setting") == setting,
        pl.col("outcome") == outcome,
        *(pl.col(name) == value for name, value in more.items()),
    )
    assert len(found) == 1
    return found.to_dicts()[0]


def test_an_effect_is_the_mean_over_recipes_that_differ_in_one_setting_alone():
    """lr=1, sam=1 has no partner in either direction of sam and must not count."""
    cells = [
        {"lr": 0.1, "sam": 0.0, "fold": 50.0, "base": 90.0},
        {"lr": 0.1, "sam": 0.05, "fold": 54.0, "base": 91.0},
        {"lr": 0.2, "sam": 0.0, "fold": 60.0, "base": 92.0},
        {"lr": 0.2, "sam": 0.05, "fold": 62.0, "base": 91.0},
        {"lr": 1.0, "sam": 0.05, "fold": 0.0, "base": 0.0},
    ]
    line = line_of(effects(lines_of(cells, ("lr", "sam")), "repaired", 0.5), "sam")
    assert (line["low"], line["high"], line["n"], line["effect"]) == ("0", "0.05", 2, 3)
    assert (line["half"], line["base_half"]) == (None, None)  # of two pairs
    assert (line["base_effect"], line["where"]) == (0, "lr=0.1 or 0.2")
    cells += [{"lr": 0.3, "sam": sam, "fold": 60 + 60 * sam, "base": 91.0 if sam else None} for sam in (0.0, 0.05)]
    line = line_of(effects(lines_of(cells, ("lr", "sam")), "repaired", 0.5), "sam")
    assert (line["n"], line["effect"]) == (3, 3)
    assert line["half"] == pytest.approx(4.30265273 / 3**0.5)  # t(2) sd / sqrt(n), sd = 1
    assert line["base_half"] is None  # two of the three pairs have a base


def test_seeds_are_averaged_before_anything_is_counted():
    cells = [
        {"lr": lr, "sam": sam, "seed": seed, "fold": 50.0 + 10 * lr + sam * (1 + lr) + 3 * seed}
        for lr in range(4)
        for sam in (0, 1)
        for seed in range(3 if sam else 1)
    ]
    found = lines_of(cells, ("lr", "sam"))
    line = line_of(effects(found, "repaired", 0.5), "sam")
    assert line["n"] == 4
    assert line["effect"] == pytest.approx(2.5 + 3)  # the mean seed of the upper level is 1
    by_hand = pairs(found.at("repaired", 0.5), "sam", found.settings, 0, 1)
    assert by_hand["fold"].to_list() == pytest.approx([4, 5, 6, 7])
    assert by_hand["seeds_low"].to_list() == [1] * 4
    assert by_hand["seeds_high"].to_list() == [3] * 4
    assert by_hand["recipe"].to_list() == [f"lr={lr}" for lr in range(4)]


def test_levels_are_neighbours_in_the_order_of_numbers_and_the_first_with_the_last():
    found = effects(lines_of(grid({"lr": (0.1, 0.01, 0.001), "sam": (0, 1)}, noisy), ("lr", "sam")), "repaired", 0.5)
    steps = found.filter(pl.col("outcome") == "fold", pl.col("setting") == "lr").select("low", "high").rows()
    assert steps == [("0.001", "0.01"), ("0.01", "0.1"), ("0.001", "0.1")]


def nested_cells() -> list[dict]:
    """Momentum exists under sgd alone, where it has two levels."""
    adam = grid({"optim": ("adam",), "momentum": (None,), "lr": (0.1, 0.2)}, noisy)
    return adam + grid({"optim": ("sgd",), "momentum": (0.9, 0.99), "lr": (0.1, 0.2)}, noisy)


def test_a_setting_that_only_some_recipes_have_is_compared_among_these():
    found = effects(lines_of(nested_cells(), ("optim", "momentum", "lr")), "repaired", 0.5)
    assert set(found["setting"]) == {"momentum", "lr"}  # no recipe of adam has a partner that differs in optim alone
    line = line_of(found, "momentum")
    assert (line["low"], line["high"], line["where"], line["n"]) == ("0.9", "0.99", "optim=sgd", 2)
    assert line_of(found, "lr")["n"] == 3


def test_settings_that_always_change_together_are_one():
    cells = [cell for cell in nested_cells() if cell["momentum"] != 0.99]
    found = effects(lines_of(cells, ("momentum", "optim", "lr")), "repaired", 0.5)
    line = line_of(found, "optim")  # the one that every recipe has
    assert (line["along"], line["low"], line["high"], line["n"]) == ("momentum", "adam", "sgd", 2)
    assert "momentum" not in found["setting"].to_list()
    table = lines_of(cells, ("momentum", "optim", "lr")).at("repaired", 0.5)
    by_momentum = pairs(table, "momentum", ("momentum", "optim", "lr"), None, "0.9")
    assert by_momentum["fold"].mean() == pytest.approx(line["effect"])


def test_where_a_sign_changes_both_halves_stand_in_place_of_the_mean():
    def turned(sam, l1, lr, wd) -> dict[str, float]:
        return {"fold": 60 + sam * (5 if l1 else -5) + noisy(sam=sam, l1=l1, lr=lr, wd=wd)["fold"] / 10}

    cells = grid({"sam": (0, 1), "l1": (0, 1), "lr": (1, 2, 3), "wd": (0, 1)}, turned)
    found = effects(lines_of(cells, ("sam", "l1", "lr", "wd")), "repaired", 0.5)
    halves = found.filter(pl.col("outcome") == "fold", pl.col("setting") == "sam")
    assert halves.select("over", "where", "n").rows() == [("l1", "l1=0", 6), ("l1", "l1=1", 6)]
    assert halves["effect"].to_list() == pytest.approx([-5, 5], abs=0.3)
    assert (halves["p_flip"] < 1e-3).all()
    assert line_of(found, "sam", "base")["over"] == ""


def test_the_other_stage_stands_beside_an_effect_over_the_same_pairs():
    cells = grid({"sam": (0, 1), "lr": (1, 2, 3)}, lambda sam, lr: {"fold": 60.0 + 3 * sam, "raw": 20.0 + lr * sam})
    line = line_of(effects(lines_of(cells, ("sam", "lr")), "repaired", 0.5), "sam")
    assert (line["effect"], line["repaired_effect"], line["raw_effect"]) == (3, 3, 2)
    assert line["raw_half"] == pytest.approx(4.30265273 / 3**0.5)


def test_a_cell_that_lacks_an_outcome_counts_for_the_others():
    cells = grid({"sam": (0, 1), "lr": (1, 2, 3)}, noisy)
    cells[0]["fold"] = None
    found = effects(lines_of(cells, ("sam", "lr")), "repaired", 0.5)
    assert line_of(found, "sam")["n"] == 2
    assert line_of(found, "sam", "base")["n"] == 3


def test_the_family_of_holm_is_one_outcome():
    levels = {"a": (0, 1), "b": (0, 1), "c": (0, 1, 2)}
    found = effects(lines_of(grid(levels, noisy), tuple(levels)), "repaired", 0.5)
    for _, family in found.group_by("outcome"):
        smallest = family.sort("p").row(0, named=True)
        assert smallest["p_holm"] == pytest.approx(min(1, smallest["p"] * len(family)))


def test_a_random_search_has_no_pairs_and_an_empty_table():
    cells = [{"lr": 0.1 + i, "wd": i / 7, "fold": 1.0 * i} for i in range(6)]
    found = effects(lines_of(cells, ("lr", "wd")), "repaired", 0.5)
    assert found.is_empty()
    assert found.schema["effect"] == pl.Float64
    assert effects(lines_of(cells, ("lr", "wd")), "unknown", 0.5).is_empty()


def test_unknown_settings_and_levels_are_refused_with_the_known_ones():
    found = lines_of(grid({"lr": (0.1, 0.2)}, noisy), ("lr",))
    with pytest.raises(UserError, match="unknown setting 'sam'; choose from: lr"):
        pairs(found.at("repaired", 0.5), "sam", found.settings, 0, 1)
    with pytest.raises(UserError, match=r"unknown level of lr '0.3'.*choose from: 0.1, 0.2"):
        pairs(found.at("repaired", 0.5), "lr", found.settings, 0.1, 0.3)


def test_on_a_balanced_grid_the_model_says_what_matched_pairs_say():
    pytest.importorskip("statsmodels")
    levels = {"a": (0, 1), "b": (0, 1), "c": (0, 1, 2), "d": (0, 1)}
    cells = [cell | {"seed": seed} for seed in range(2) for cell in grid(levels, noisy)]
    for cell in cells:
        cell["fold"] += 3 * cell["a"] + 2 * cell["a"] * cell["b"] + np.sin(37 * cell["seed"] + cell["c"])
    found = check(lines_of(cells, tuple(levels)), "repaired", 0.5)
    assert found["model_effect"].to_numpy() == pytest.approx(found["effect"].to_numpy())
    a = found.row(by_predicate=pl.col("setting") == "a", named=True)
    assert a["effect"] == pytest.approx(4, abs=1)
    assert 0.4 < a["model_half"] / a["half"] < 1.2  # the model takes the interaction out of the spread


def test_the_model_agrees_on_a_nested_grid_with_holes():
    pytest.importorskip("statsmodels")
    levels = {"optim": (0, 1), "momentum": (0.9, 0.99), "lr": (1, 2, 3), "l1": (0, 1), "aug": (0, 1)}
    cells = [c | ({} if c["optim"] else {"momentum": None}) for c in grid(levels, noisy)]
    cells = [c for i, c in enumerate({tuple(c[n] for n in levels): c for c in cells}.values()) if i % 9]
    for cell in cells:
        cell["fold"] += 4 * cell["l1"]
    found = check(lines_of(cells, tuple(levels)), "repaired", 0.5)
    assert ((found["model_effect"] - found["effect"]).abs() < found["half"]).all()


def test_a_model_with_more_terms_than_recipes_is_refused():
    pytest.importorskip("statsmodels")
    found = lines_of(grid({"a": (0, 1), "b": (0, 1), "c": (0, 1)}, noisy), ("a", "b", "c"))
    with pytest.raises(UserError, match=r"too many terms for 8 recipes \(1 to spare, 8 needed\)"):
        check(found, "repaired", 0.5)


def test_a_thousand_cells_take_less_than_a_second_or_two():
    """Meant: 0.2 s; the bound leaves room for a busy machine."""
    levels = {"a": (0, 1), "b": (0, 1), "c": (0, 1), "d": (0, 1, 2), "e": (0, 1, 2), "f": (0, 1), "g": tuple(range(8))}
    rng = np.random.default_rng(0)
    found = lines_of(grid(levels, lambda **_: {"fold": rng.normal(), "base": rng.normal()}), tuple(levels))
    start = time.process_time()
    effects(found, "repaired", 0.5)
    assert len(found.table) == 1152
    assert time.process_time() - start < 2
