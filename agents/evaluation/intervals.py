"""95 % intervals: of a mean, by resampling; of a share of zeros and ones, by Wilson's formula.

Two evaluations of the same prompts and seeds are compared pair by pair.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
STANDARD_ERRORS = 2.0
"""A paired difference counts if it exceeds zero by this many standard errors."""
RESAMPLES = 10_000
_CHUNK = 500
"""Resamples that are drawn at once, which bounds the memory."""
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of a mean (Efron 1979), or `None` for fewer than two values.

    Resamples of the same size are drawn with replacement, with a fixed seed, so equal values give an equal interval.
    With few values, such as five, the interval is too narrow.

    Args:
        values: independent ones, `(values,)`, such as the mean score of every prompt.
    """
    if len(values) < 2:
        return None
    rng = np.random.default_rng(0)
    size = (_CHUNK, len(values))
    means = [values[rng.integers(len(values), size=size)].mean(axis=1) for _ in range(RESAMPLES // _CHUNK)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927), within [0, 1]; the trials count as independent.

    Raises:
        ValueError: if there are no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes must be in [0, trials], and trials at least 1; got {successes} of {trials}")
    share = successes / trials
    centre = share + _Z**2 / (2 * trials)
    half = _Z * (share * (1 - share) / trials + _Z**2 / (4 * trials**2)) ** 0.5
    scale = 1 + _Z**2 / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def paired_difference(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of the differences `after - before`, and its standard error.

    Seeds that are easy or hard for every policy do not widen it.

    Args:
        before: scores, `(samples,)`, at least two.
        after: scores of the samples of the same prompts and seeds, `(samples,)`.
    """
    difference = after - before
    return float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))


def is_higher(scores: NDArray[np.float64], than: NDArray[np.float64], standard_errors: float = STANDARD_ERRORS) -> bool:
    """Return whether scores are higher than others by more than some standard errors of the paired difference.

    Args:
        scores: of samples, `(samples,)`, at least two.
        than: scores of the samples of the same prompts and seeds, `(samples,)`.
        standard_errors: their number.
    """
    mean, error = paired_difference(than, scores)
    return mean > standard_errors * error
