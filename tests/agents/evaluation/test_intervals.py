"""Intervals against scipy's, known values, and the share of simulated samples whose mean they contain."""

import numpy as np
import pytest

from agents.evaluation.intervals import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (96, 100), (1, 1)])
def test_wilson_interval_is_scipys(successes: int, trials: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, trials), (expected.low, expected.high), atol=1e-9)


def test_wilson_interval_of_a_known_case() -> None:
    # 15 of 148: Newcombe (1998), table I, method 3.
    np.testing.assert_allclose(wilson_interval(15, 148), (0.0624, 0.1605), atol=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)


def test_bootstrap_interval_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).exponential(size=30)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(values), (expected.low, expected.high), atol=0.02)


def test_bootstrap_interval_contains_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(3)
    intervals = [bootstrap_interval(rng.normal(5, 2, size=45)) for _ in range(100)]
    assert 88 <= sum(low < 5 < high for low, high in intervals if low) <= 99


def test_bootstrap_interval_is_the_same_every_time_and_none_for_one_value() -> None:
    values = np.array([1.0, 2.0, 4.0])
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values[:1]) is None
    assert bootstrap_interval(np.full(5, 2.5)) == (2.5, 2.5)
