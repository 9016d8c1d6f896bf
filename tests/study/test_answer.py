import dataclasses

import polars as pl
from made_lines import grid, lines_of

from pipeline.study.answer import answer, headline_place, telling
from pipeline.study.claims import Claim

LEVELS = {"rho": (0.0, 0.05), "l1": (0.0, 1e-5), "lr": (1, 2, 3), "wd": (1, 2, 3)}


def values(rho, l1, lr, wd) -> dict[str, float]:
    wobble = (37 * lr + 11 * wd + 5 * bool(rho) + 3 * bool(l1)) % 13 / 13
    return {"fold": 60 + 6 * bool(rho) + wobble, "base": 90 + wobble, "prune": 55 - wobble, "raw": 20 + wobble}


def test_one_network_is_not_called_networks():
    one = {name: levels[:1] for name, levels in LEVELS.items()}
    assert answer(lines_of(grid(one, values), ()))[0] == "One network was measured."


def test_an_answer_has_at_most_ten_sentences_and_says_what_was_measured_what_is_left_and_what_acts():
    sentences = answer(lines_of(grid(LEVELS, values), tuple(LEVELS)))
    assert len(sentences) <= 10
    assert sentences[0] == "36 networks of 36 recipes were measured; they differ in rho, l1, lr, wd."
    assert sentences[1].startswith("Folding at half of the channels, repaired, leaves 63.")
    assert "uncompressed 90." in sentences[1]
    assert "raw 20." in sentences[1]
    assert "and leads the best pruning by " in sentences[1]
    assert sentences[2] == "No recipe has two seeds, so that the noise of a single network is unknown."
    assert any(sentence.startswith("SAM (rho 0 to 0.05) raises") for sentence in sentences)
    assert sentences[-1].startswith("Not settled: ")
    assert all(sentence.endswith(".") for sentence in sentences)


def test_without_two_recipes_that_match_the_answer_says_so():
    cells = [{"lr": 0.1 * i, "wd": i / 7, "fold": 50.0 + i % 3} for i in range(6)]
    assert answer(lines_of(cells, ("lr", "wd")))[-1].startswith("No two recipes differ in one setting alone")


def test_networks_without_a_plain_folding_or_pruning_are_counted_and_not_compared():
    found = lines_of([{"lr": 0.1, "fold": 50.0}], ("lr",))
    bare = dataclasses.replace(found, table=found.table.clear(), methods=pl.DataFrame({"cell": ["a", "a"]}))
    (sentence,) = answer(bare)
    assert sentence.startswith("1 network was measured, and none by plain folding or pruning")


def test_folding_that_does_not_lead_is_not_said_to():
    cells = grid(LEVELS, lambda rho, l1, lr, wd: {"fold": 50.0 + (-1) ** (lr + wd), "prune": 50.0})
    assert "neither leads nor trails the best pruning by" in answer(lines_of(cells, tuple(LEVELS)))[1]


def test_fewer_than_three_recipes_have_neither_an_interval_nor_a_share():
    def left(recipes):
        cells = [{"lr": i, "fold": 60.0 + i, "base": 90.0 + i, "prune": 50.0} for i in range(recipes)]
        return answer(lines_of(cells, ("lr",)))[1]

    two = left(2)
    assert two == (
        "Folding at half of the channels, repaired, leaves 60.5% (uncompressed 90.5%), and +10.5 points against the "
        "best pruning (over 2 recipes, too few for an interval)."
    )
    assert "±" in left(3)
    assert "(ahead in 100%)" in left(3)


def test_the_headline_is_the_repaired_stage_unless_most_networks_lack_it():
    found = lines_of(grid(LEVELS, values), tuple(LEVELS))
    assert headline_place(found) == ("repaired", 0.5)
    few = found.table.filter((pl.col("stage") == "raw") | pl.col("cell").is_in(["1", "2"]))
    assert headline_place(dataclasses.replace(found, table=few)) == ("raw", 0.5)


def claim(setting: str, size: float, sign: int, outcome: str = "fold", kind: str = "effect") -> Claim:
    return Claim(f"{setting} {size}", kind, setting, "0", "1", outcome, size, 9, signs=frozenset([sign]))


def test_of_each_setting_the_largest_effect_is_told_and_one_of_the_other_sign():
    found = [claim("a", 1, 1), claim("a", 3, 1), claim("a", 2, -1), claim("b", 4, 1), claim("c", 9, 1, "gap")]
    found += [
        claim("d", 99, 1, kind="none"),
        claim("b", 7, 1, kind="interaction"),
        claim("a", 6, 1, kind="interaction"),
    ]
    assert [c.text for c in telling(found)] == ["b 4", "a 3", "a 2", "b 7", "c 9"]
    assert [c.text for c in telling(found, 3)] == ["b 4", "b 7", "c 9"]
