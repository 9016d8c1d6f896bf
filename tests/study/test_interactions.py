import pytest
from made_lines import grid, lines_of

from pipeline.study.interactions import interactions

LEVELS = {"sam": (0, 1), "l1": (0, 1), "lr": (1, 2, 3)}


def found_over(values, **where) -> dict:
    table = interactions(lines_of(grid(LEVELS, values), tuple(LEVELS)), "repaired", 0.5)
    rows = [row for row in table.to_dicts() if all(row[name] == value for name, value in where.items())]
    assert len(rows) == 1
    return rows[0]


def test_an_effect_is_told_at_both_levels_of_another_setting():
    row = found_over(lambda sam, l1, lr: {"fold": 60 + sam * (2 + 6 * l1) + 0.1 * lr * sam}, setting="sam", other="l1")
    assert (row["other_low"], row["other_high"], row["n_low"], row["n_high"], row["n"]) == ("0", "1", 3, 3, 3)
    assert (row["effect_low"], row["effect_high"], row["difference"]) == pytest.approx((2.2, 8.2, 6))
    assert row["half"] == pytest.approx(0, abs=1e-9)  # quadruples differ in the two settings alone
    assert row["half_low"] == pytest.approx(4.30265273 * 0.1 / 3**0.5)
    assert not row["flips"]


def test_a_sign_that_changes_is_found_and_tested_by_the_weaker_half():
    row = found_over(lambda sam, l1, lr: {"fold": 60 + sam * ((4 if l1 else -1) + 0.1 * lr)}, setting="sam", other="l1")
    assert row["flips"]
    assert (row["effect_low"], row["effect_high"]) == pytest.approx((-0.8, 4.2))
    low = 2 * 0.5 * (1 - (t := 0.8 / (0.1 / 3**0.5)) / (2 + t * t) ** 0.5)  # Student's t with 2 degrees of freedom
    assert row["p_flip"] == pytest.approx(low * 14)  # as many lines have the table's family


def test_without_a_change_of_sign_nothing_flips():
    row = found_over(lambda sam, l1, lr: {"fold": 60 + sam * (4 + l1 + 0.1 * lr)}, setting="sam", other="l1")
    assert not row["flips"]
    assert row["p_flip"] == 1


def test_one_test_stands_in_two_lines_and_counts_once():
    def values(sam, l1, lr):
        return {"fold": 60 + sam * l1 * (3 + lr) + 7 * ((5 * sam + 3 * l1 + lr) % 3)}

    one, other = (found_over(values, setting=a, other=b) for a, b in (("sam", "l1"), ("l1", "sam")))
    assert one["difference"] == pytest.approx(other["difference"])
    assert one["p_holm"] == other["p_holm"] <= 7 * one["p"] + 1e-12  # sam x l1, and each with three steps of lr


def test_halves_without_common_recipes_have_no_difference():
    """Quadruples need the four combinations at one lr."""
    cells = [cell for cell in grid(LEVELS | {"lr": (1, 2, 3, 4)}, lambda sam, l1, lr: {"fold": 60.0 + sam * l1 * lr})]
    cells = [cell for cell in cells if bool(cell["l1"]) == (cell["lr"] > 2)]
    table = interactions(lines_of(cells, tuple(LEVELS)), "repaired", 0.5)
    row = next(row for row in table.to_dicts() if (row["setting"], row["other"]) == ("sam", "l1"))
    assert (row["n_low"], row["n_high"], row["n"]) == (2, 2, 0)
    assert row["difference"] is row["half"] is row["p"] is row["p_holm"] is None


def test_base_and_stages_stand_beside_the_halves():
    row = found_over(
        lambda sam, l1, lr: {"fold": 60.0 + sam, "base": 90.0 + sam * l1, "raw": 20.0 + 2 * sam * (1 - l1)},
        setting="sam",
        other="l1",
    )
    assert (row["base_low"], row["base_high"], row["raw_low"], row["raw_high"]) == (0, 1, 2, 0)
