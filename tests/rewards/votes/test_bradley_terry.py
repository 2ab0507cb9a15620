"""Scores from votes: closed forms, and an independent optimiser's answer."""

import numpy as np
import pytest
import torch

from rewards.votes.bradley_terry import posterior, scores

FLAT = 1e-9
"""A precision so small that the scores are those of maximum likelihood."""


def test_difference_of_two_is_the_log_odds_of_their_votes():
    winners, losers = np.array([0] * 7 + [1] * 2), np.array([1] * 7 + [0] * 2)
    found = scores(winners, losers, np.zeros(2), FLAT)
    assert found[0] - found[1] == pytest.approx(np.log(7 / 2), abs=1e-6)


def test_votes_in_a_circle_and_equal_votes_leave_equal_scores():
    circle, equal = ([0, 1, 2], [1, 2, 0]), ([0, 1], [1, 0])
    for winners, losers in (circle, equal):
        np.testing.assert_allclose(scores(np.array(winners), np.array(losers), np.zeros(3), 1.0), 0, atol=1e-9)


def test_prior_stays_without_votes_and_yields_to_them():
    prior = np.array([2.0, 0.0, -1.0])
    none = np.zeros(0, int)
    np.testing.assert_array_equal(scores(none, none, prior, 1.0), prior)
    found = scores(np.full(50, 1), np.full(50, 0), prior, 1.0)
    assert found[1] > found[0]
    assert found[2] == -1.0
    assert np.isfinite(found).all()


def test_posterior_is_where_an_independent_optimiser_ends():
    generator = np.random.default_rng(0)
    differences, mean = 3 * generator.standard_normal((40, 4)), generator.standard_normal(4)
    weights = torch.tensor(mean, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss(at):
        votes = torch.nn.functional.logsigmoid(torch.tensor(differences) @ at).sum()
        return 0.25 * ((at - torch.tensor(mean)) ** 2).sum() - votes

    def closure():
        optimiser.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    optimiser.step(closure)
    found = posterior(differences, mean, 0.5)
    np.testing.assert_allclose(found.mode, weights.detach(), atol=1e-6)
    hessian = torch.autograd.functional.hessian(loss, torch.tensor(found.mode))
    np.testing.assert_allclose(found.covariance, np.linalg.inv(hessian), atol=1e-6)


def test_precision_must_be_positive():
    with pytest.raises(ValueError, match="precision must be positive .* got precision=0"):
        scores(np.array([0]), np.array([1]), np.zeros(2), 0)
