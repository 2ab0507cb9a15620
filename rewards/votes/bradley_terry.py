"""From votes to scores: the Bradley-Terry model (1952, "Rank analysis of incomplete block designs", Biometrika 39).

Each thing has a score, and the first of two wins with probability σ(score₁ - score₂). The scores may be free, or linear
in features of the things, which makes it a logistic regression. A normal prior keeps the scores of things without a
defeat finite.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
_MOST_STEPS, _TOLERANCE = 100, 1e-9


class Posterior(NamedTuple):
    """What the votes say about the weights.

    Attributes:
        mode: The most probable weights, (weights,).
        covariance: Of the normal distribution that fits there (Laplace's approximation), (weights, weights).
    """

    mode: _Floats
    covariance: _Floats


def posterior(differences: _Floats, prior_mean: _Floats, precision: float) -> Posterior:
    """Find the weights w that maximise Σ log σ(w·difference) - precision/2 |w - prior_mean|², by Newton's method.

    Args:
        differences: Features of the winner minus features of the loser of each vote, (votes, weights).
        prior_mean: Weights before the first vote, (weights,).
        precision: Of the prior: one over the variance of each weight.

    Raises:
        ValueError: `precision` is not positive, or something is not finite, so that there is no single maximum.
    """
    if not (precision > 0 and np.isfinite(differences).all() and np.isfinite(prior_mean).all()):
        raise ValueError(f"precision must be positive and the features finite; got precision={precision}")
    weights = prior_mean.astype(np.float64)
    for _ in range(_MOST_STEPS):
        defeats = 1 / (1 + np.exp(np.clip(differences @ weights, -500, 500)))  # probability of the other outcome
        gradient = differences.T @ defeats - precision * (weights - prior_mean)
        curvature = (differences.T * (defeats * (1 - defeats))) @ differences + precision * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > _TOLERANCE and _log_probability(differences, weights + size * step, prior_mean, precision) < (
            _log_probability(differences, weights, prior_mean, precision)
        ):
            size /= 2
        weights = weights + size * step
        if np.abs(size * step).max(initial=0.0) <= _TOLERANCE:
            break
    return Posterior(weights, np.asarray(np.linalg.inv(curvature), np.float64))


def scores(winners: NDArray[np.int_], losers: NDArray[np.int_], prior_mean: _Floats, precision: float) -> _Floats:
    """Return the Bradley-Terry score of each thing, (things,): the difference of two is the log-odds of a vote.

    Args:
        winners: Index of the thing that won each vote, (votes,).
        losers: Index of the thing that lost it, (votes,).
        prior_mean: Scores before the votes, (things,).
        precision: One over the variance with which a score differs from its prior mean.

    Raises:
        ValueError: As `posterior`.
    """
    things = np.eye(len(prior_mean))
    return posterior(things[winners] - things[losers], prior_mean, precision).mode


def _log_probability(differences: _Floats, weights: _Floats, prior_mean: _Floats, precision: float) -> float:
    votes = -np.logaddexp(0.0, -(differences @ weights)).sum()
    return float(votes - precision / 2 * ((weights - prior_mean) ** 2).sum())
