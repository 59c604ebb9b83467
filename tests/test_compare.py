"""Intervals, paired tests and their correction, against scipy and exact distributions."""

import numpy as np
import pytest
from scipy import stats

from mass import compare


def test_paired_comparison_is_that_of_the_two_by_two_table() -> None:
    # 30 both, 17 the first alone, 5 the second alone, 48 neither
    a = np.array([1] * 30 + [1] * 17 + [0] * 5 + [0] * 48, bool)
    b = np.array([1] * 30 + [0] * 17 + [1] * 5 + [0] * 48, bool)
    found = compare.paired(a, b)
    assert (found.won, found.lost, found.difference) == (17, 5, pytest.approx(0.12))
    assert found.p == pytest.approx(stats.binomtest(5, 22, 0.5).pvalue) and 0.01 < found.p < 0.02
    # the bootstrap's exact distribution: sums of 100 draws of +1, -1 and 0
    draw = np.random.default_rng(7).multinomial(100, [0.17, 0.05, 0.78], size=400_000)
    exact = np.quantile((draw[:, 0] - draw[:, 1]) / 100, [0.025, 0.975])
    assert found.interval == pytest.approx(tuple(exact), abs=0.0101)
    # what the pairs have in common does not widen it, as two separate samples would
    separate = 2 * 1.96 * np.sqrt(a.var() / 100 + b.var() / 100)
    assert found.interval[1] - found.interval[0] < 0.7 * separate  # type: ignore[index]
    turned = compare.paired(b, a)
    assert (turned.won, turned.lost, turned.p) == (5, 17, found.p) and turned.difference == -found.difference
    assert compare.paired(a, a).p == 1.0 and compare.paired(a, a).interval == (0.0, 0.0)
    with pytest.raises(ValueError, match="not answers to the same problems"):
        compare.paired(a, b[:99])


def test_interval_has_the_quantiles_of_the_binomial() -> None:
    right = [True] * 60 + [False] * 140
    found = compare.interval(right)
    exact = stats.binom.ppf([0.025, 0.975], 200, 0.3) / 200
    assert found == pytest.approx(tuple(exact), abs=0.0051) and compare.interval(right) == found
    assert compare.interval([True] * 9) == (1.0, 1.0) and compare.interval([True]) is None


def test_holm_by_hand() -> None:
    assert compare.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert compare.holm([]) == []
