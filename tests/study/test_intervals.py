import numpy as np
import pytest
from scipy.stats import ttest_1samp

from pipeline.study.intervals import holm, needed, summary


def test_a_summary_is_scipys_t_test_of_what_is_there():
    values = np.random.default_rng(0).normal(1, 2, (12, 3))
    values[:4, 1] = np.nan
    found = summary(values)
    expected = ttest_1samp(values, 0, nan_policy="omit")
    low, high = expected.confidence_interval()
    assert found.n.tolist() == [12, 8, 12]
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean - found.half == pytest.approx(low)
    assert found.mean + found.half == pytest.approx(high)


def test_one_value_has_a_mean_and_no_interval():
    found = summary(np.array([[3.0, np.nan]]))
    assert found.mean[0] == 3
    assert np.isnan([found.half[0], found.p[0], found.sd[0], found.mean[1]]).all()
    assert found.n.tolist() == [1, 0]


def test_differences_that_are_all_zero_are_no_effect():
    found = summary(np.zeros((5, 1)))
    assert (found.half[0], found.p[0]) == (0, 1)


def test_holm_multiplies_by_the_hypotheses_that_are_left_and_never_falls():
    assert holm(np.array([0.04, 0.01, np.nan, 0.03])) == pytest.approx([0.06, 0.03, np.nan, 0.06], nan_ok=True)
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1, 1])
    assert holm(np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("sd", [0.0, 0.3, 1.0, 2.7, 40.0])
def test_needed_is_the_fewest_pairs_whose_interval_is_narrow_enough(sd):
    def half(n: int) -> float:
        return summary(np.linspace(-1, 1, n)[:, None]).half[0] / np.linspace(-1, 1, n).std(ddof=1) * sd

    n = needed(sd)
    assert half(n) <= 1
    assert n == 2 or half(n - 1) > 1


def test_an_unknown_spread_needs_an_unknown_number():
    assert needed(None) is None
    assert needed(np.nan) is None
