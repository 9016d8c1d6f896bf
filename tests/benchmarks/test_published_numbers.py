import numpy as np
import polars as pl
import pytest

from benchmarks.published_numbers import (
    corruptions,
    cyclic,
    distances,
    factor,
    falls,
    level,
    mean,
    outgrown,
    rate_and_decay,
    rises,
)
from pipeline.study.lines import Lines
from pipeline.tasks import METRICS

RNG = np.random.default_rng(0)


def lines_of(table: pl.DataFrame) -> Lines:
    return Lines(table, pl.DataFrame(), (), METRICS["acc"])


def test_a_sentence_keeps_its_number_only_while_the_interval_agrees() -> None:
    up, nothing = mean(np.array([1.0, 2.0, 3.0, 2.0])), mean(np.array([1.0, -1.0, 0.5, -0.5]))
    assert rises(up, "pairs") == "+2.0 ± 1.3 points (4 pairs)"
    assert level(nothing, "networks") == "+0.0 ± 1.5 points (4 networks)"
    for wrong, found in ((falls, up), (level, up), (rises, nothing), (falls, nothing)):
        with pytest.raises(AssertionError, match="the page says that this is"):
            wrong(found)


def test_a_gap_of_language_models_is_a_factor_of_perplexity() -> None:
    gap = mean(100 * np.log([2.0, 2.0, 2.0, 2.1]))
    assert factor(gap, 1).startswith("2.02 (")
    with pytest.raises(AssertionError):
        factor(gap, -1)


def test_a_product_is_told_from_a_sum() -> None:
    rates, decays = np.meshgrid([0.001, 0.01, 0.1], [0.0, 5e-4, 1e-3])
    table = pl.DataFrame({"lr": rates.ravel(), "weight_decay": decays.ravel()})
    centred = (pl.col("lr").log10() + 2) * (pl.col("weight_decay") - 5e-4)
    found = rate_and_decay(table.with_columns(gap=centred * 1e4))
    assert found["product"] == pytest.approx(1)
    assert found["both"] == pytest.approx(0, abs=1e-9)


def test_effects_of_networks_that_each_have_a_rate_of_their_own_are_found() -> None:
    n = 120
    table = pl.DataFrame(
        {
            "lr": 10 ** RNG.uniform(-2, 0, n),
            "augment": RNG.choice(["[]", '["crop"]'], n),
            "rho": RNG.choice([0.0, 0.05, 0.1], n),
            "noise": RNG.normal(0, 0.5, n),
        }
    )
    true = {"peak rate, ten times": 3.0, "crop, flip and RandAugment": -2.0, "SAM, rho 0 to 0.05": 0.0}
    fold = 3 * pl.col("lr").log10() - 2 * (pl.col("augment") != "[]") + 4 * (pl.col("rho") == 0.1) + pl.col("noise")
    found = cyclic(table.with_columns(fold=fold), "fold")
    for name, effect in (true | {"SAM, rho 0 to 0.1": 4.0}).items():
        assert abs(found[name].value - effect) < 2 * found[name].half
        assert found[name].half < 1


def corrupt_file(fold: tuple[float, float]) -> pl.DataFrame:
    """One network: l1 and l2 lose twice as much under corruption as on clean pictures; fold: (clean, corrupt) at .5."""
    at = {
        ("l1", 0.3): (80.0, 60.0),
        ("l1", 0.5): (60.0, 20.0),
        ("l2", 0.3): (80.0, 60.0),
        ("l2", 0.5): (60.0, 20.0),
        ("fold", 0.3): (85.0, 70.0),
        ("fold", 0.5): fold,
    }
    lines = [(m, r, e, v) for (m, r), two in at.items() for e, v in zip(("REPAIR", "CORR"), two, strict=True)]
    lines += [(m, 0.0, "CORR", 80.0) for m in ("fold", "l1", "l2")]
    table = pl.DataFrame(lines, schema=["method", "ratio", "event", "value"], orient="row")
    return table.with_columns(cell=pl.lit("a"), family=pl.lit("preactresnet18"), log=pl.lit("fold-zeroshot"))


def test_corruptions_ask_for_more_than_clean_accuracy_gives() -> None:
    dense = pl.DataFrame({"cell": ["a"], "base": [90.0]})
    on_the_line = corruptions(corrupt_file((70.0, 40.0)), "preactresnet18", dense)
    assert on_the_line["clean"].to_list() == [5.0, 10.0]
    assert on_the_line["corrupt"].to_list() == [10.0, 20.0]
    assert on_the_line["excess"].to_list() == pytest.approx([0, 0])
    above = corruptions(corrupt_file((70.0, 45.0)), "preactresnet18", dense)
    assert above["excess"][1] == pytest.approx(5)
    beyond = corruptions(corrupt_file((50.0, 15.0)), "preactresnet18", dense)  # no pruned network is so poor
    assert beyond["excess"].to_list() == pytest.approx([0, None])


def test_the_nearer_network_is_found_in_the_logs_of_the_same_run() -> None:
    def figures(log: str, fold: float) -> pl.DataFrame:
        table = pl.DataFrame({"method": ["fold", "l1", "l2"], "value": [fold, 4.0, 8.0]})
        return table.with_columns(
            cell=pl.lit("a"), family=pl.lit("clip"), log=pl.lit(log), event=pl.lit("FD"), ratio=pl.lit(0.5)
        )

    table = pl.DataFrame({"cell": ["a"], "stage": ["norm_tuned"], "ratio": [0.5], "base": [90.0], "gap": [1.0]})
    found = distances(lines_of(table), pl.concat([figures("fold-noe", 2.0), figures("fold", 1.0)]), "clip")
    assert found["nearer"].to_list() == [1.0]  # half of the nearer pruning's distance, in the log without fine-tuning


def test_networks_that_a_repair_makes_better_than_whole_ones_are_counted_by_schedule() -> None:
    table = pl.DataFrame(
        {
            "cell": [str(i) for i in range(8)],
            "stage": ["repaired"] * 8,
            "ratio": [0.1] * 8,
            "schedule": ["constant"] * 4 + ["cosine"] * 4,
            "base": [60.0] * 8,
            "fold": [65.0] * 4 + [59.0] * 4,
        }
    )
    yes, n, p, split = outgrown(lines_of(table))
    assert (yes, n, split) == (4, 8, (4, 0))
    assert p == pytest.approx(2 / 70)  # Fisher's exact test of a 2 x 2 table of fours and noughts
