"""Sentences of the theory page follow from the tables, whatever these say."""

import polars as pl
import pytest

from pipeline.study.theory import closer, fewer, gained, mean, never_above, page, pair_lines, plot

RANKS = range(1, 8)


def errors(fold=0.0, groups=3):
    """Pruning loses (8 - k) / 8 of the energy at rank k of 8, folding `fold` more, the rest as much as pruning."""
    lines = []
    for group in range(groups):
        for k in RANKS:
            lost = (8 - k) / 8
            of = {"network": "net", "group": str(group), "channels": 8, "features": "writers", "rank": k}
            names = ("prune", "special", "kmeans", "kmeans, best of 5", "mix", "svd")
            lines.append({**of, **dict.fromkeys(names, lost**0.5), "fold": max(0.0, lost + fold) ** 0.5})
    return pl.DataFrame(lines)


def pairs(fold=0.4):
    same = {"seen": 1.0, "spectral": 2.0, "logits": 0.1, "logits_bound": 50.0, "shift": 0.5}
    lines = [
        {
            "network": "net",
            "group": str(group),
            "method": method,
            "measured": value + group / 100,
            "frobenius": 3.0 + group,
            **same,
        }
        for group in range(4)
        for method, value in {"prune": 0.5, "fold": fold}.items()
    ]
    return pl.DataFrame(lines)


@pytest.mark.parametrize(
    ("fold", "matched", "theorem"), [(0.0, (21, 21), (18, 18)), (0.1, (0, 21), (18, 18)), (0.2, (0, 21), (0, 18))]
)
def test_comparisons_are_counted_at_the_same_rank_and_with_one_channel_more(fold, matched, theorem):
    """An eighth of the energy goes with every channel, so one channel makes up for a tenth, but not for a fifth."""
    assert never_above(errors(fold), "fold", "prune") == matched
    assert never_above(errors(fold), "fold", "prune", more=1) == theorem


def test_differences_are_means_over_groups_with_their_interval():
    found = gained(errors(-0.05), "fold", "prune")
    assert found.value == pytest.approx(0.05)
    assert found.half == pytest.approx(0, abs=1e-9)
    assert found.n == 3, "groups, not ranks"
    assert mean([1.0, 2.0, 3.0]).half == pytest.approx(2.484, abs=1e-3)  # 4.303 / sqrt(3)


def test_groups_are_paired_whatever_their_order():
    table = pairs()
    shuffled = pl.concat([table.filter(method="fold"), table.filter(method="prune").reverse()])
    for one in (table, shuffled):
        assert fewer(one, "fold", "prune", "measured") == (4, 4)
        assert fewer(one, "prune", "fold", "measured") == (0, 4)


def test_a_difference_within_its_interval_is_said_to_be_nothing():
    assert closer(pairs(), "measured") == "10.0 ± 0.0% of its norm (n = 4 groups)"
    assert closer(pairs(fold=0.5), "measured").endswith(", which may be nothing")


def test_bounds_that_are_broken_are_counted():
    broken = pairs().with_columns(seen=pl.lit(0.41))
    assert "the bounds are broken 0 times" in pair_lines(pairs())[-3]
    assert "the bounds are broken 6 times" in pair_lines(broken)[-3]


def test_page_and_picture_are_written(tmp_path):
    text = page(errors(0.1), pairs())
    assert "in 18 of 18 cases (100.0%)" in text
    assert "in 0 of 21 cases (0.0%)" in text
    assert "| k-means, best of 5 |" in text
    plot(errors(), pairs(), tmp_path / "theory.png")
    assert (tmp_path / "theory.png").stat().st_size > 10_000
