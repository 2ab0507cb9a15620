"""Advantages within the samples of a prompt, and the critic's targets: by hand and against Stable-Baselines3."""

import copy

import numpy as np
import pytest
import torch
from helpers.rollouts import BOX, rollout
from stable_baselines3.common.buffers import RolloutBuffer

from agents import (
    BatchAdvantage,
    DecoupledAdvantage,
    GeneralizedAdvantage,
    GroupRelativeAdvantage,
    LeaveOneOutAdvantage,
    PerPromptAdvantage,
    RawReturn,
)
from agents.rollout.buffer import TensorRolloutBuffer

RETURNS = [[1.0, 2.0, 6.0, 10.0, 30.0], [3.0, 20.0, 7.0, 0.0, -5.0]]
PROMPTS = [["a cat", "a cat", "a dog", "a dog", "an ant"], ["a cat", "an ant", "a dog", "an ant", "an ant"]]


def by_prompt():
    groups = {}
    for index, prompt in enumerate(np.ravel(PROMPTS)):
        groups.setdefault(prompt, []).append(index)
    return groups


def test_group_relative_advantage_is_the_standard_score_within_the_prompt():
    advantages = GroupRelativeAdvantage(clip=1.2)(rollout(RETURNS, PROMPTS))
    flat = np.ravel(RETURNS)
    expected = np.empty(10)
    for members in by_prompt().values():
        expected[members] = (flat[members] - flat[members].mean()) / flat[members].std()
    assert np.abs(expected).max() > 1.2
    for step in range(6):
        np.testing.assert_allclose(advantages[step], expected.clip(-1.2, 1.2).reshape(2, 5)[step // 3], rtol=1e-4)


def test_without_a_standard_deviation_groups_keep_their_scale():
    advantages = GroupRelativeAdvantage("none")(rollout(RETURNS, PROMPTS))
    assert advantages[0].tolist() == pytest.approx([-1, 0, 6 - 23 / 3, 10 - 23 / 3, 30 - 45 / 4])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"scale": "none"}, [[-45.0, -15.0], [15.0, 45.0]]),
        ({"scale": "none", "clip": 20.0}, [[-20.0, -15.0], [15.0, 20.0]]),
    ],
)
def test_advantages_in_the_rewards_unit_are_clipped_only_if_told_to(arguments, expected):
    advantages = GroupRelativeAdvantage(**arguments)(rollout([[60.0, 90.0], [120.0, 150.0]], [["a cat"] * 2] * 2))
    assert advantages[::3].tolist() == expected


def test_standardised_advantages_are_clipped_at_5_by_default():
    advantages = GroupRelativeAdvantage()(rollout([[0.0] * 30 + [1.0]], [["a cat"] * 31]))  # 5.48 deviations
    assert advantages[0].max() == 5


def test_standard_deviation_of_the_batch_keeps_the_proportions_of_the_groups():
    advantages = GroupRelativeAdvantage("batch", clip=np.inf)(rollout(RETURNS, PROMPTS))
    flat = np.ravel(RETURNS)
    for episode, prompt in enumerate(np.ravel(PROMPTS)):
        expected = (flat[episode] - flat[by_prompt()[prompt]].mean()) / flat.std()
        assert advantages[3 * (episode // 5), episode % 5].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def with_details(details):
    """Episodes of two prompts, a cat's and a dog's, whose reward reported these numbers."""
    one = rollout([0.0] * 6, ["a cat", "a dog"] * 3)
    one.details = {name: np.array(values, np.float64) for name, values in details.items()}
    return one


def test_decoupled_advantage_is_gdpos_sum_of_standard_scores():
    """The small term moves in units of 1e-3 and the large one in hundreds; in one group the large one does not move."""
    small, large = [1e-3, 5e-3, 2e-3, 1e-3, 6e-3, 9e-3], [500.0, 100.0, 100.0, 100.0, 300.0, 100.0]
    advantages = DecoupledAdvantage({"small": 2.0, "large": -1.0}, clip=1.3)(
        with_details({"small": small, "large": large})
    )
    expected = np.zeros(6)
    for group in ([0, 2, 4], [1, 3, 5]):
        for weight, values in ((2.0, small), (-1.0, large)):
            chosen = np.array([values[member] for member in group])
            if chosen.std():
                expected[group] += weight * (chosen - chosen.mean()) / chosen.std()
    expected = (expected - expected.mean()) / expected.std()
    assert np.abs(expected).max() > 1.3
    np.testing.assert_allclose(advantages[0], expected.clip(-1.3, 1.3), rtol=1e-5, atol=1e-6)


def test_decoupled_advantage_of_equal_samples_is_0():
    equal = with_details({"a": [0.1, 7.0] * 3, "b": [3.0, -3.0] * 3})
    assert not DecoupledAdvantage({"a": 1.0, "b": 2.0})(equal).any()


def test_decoupled_advantage_needs_the_number_of_every_sample():
    one = with_details({"a": [0.1, np.nan] * 3, "b": [3.0, -3.0] * 3})
    with pytest.raises(ValueError, match="detail 'c', which is not reported; numbers that it reports are: a, b"):
        DecoupledAdvantage({"c": 1.0})(one)
    with pytest.raises(ValueError, match="detail 'a', which is not finite for every sample"):
        DecoupledAdvantage({"b": 1.0, "a": 1.0})(one)


def test_leave_one_out_compares_with_the_others_mean():
    advantages = LeaveOneOutAdvantage()(rollout(RETURNS, PROMPTS))
    flat = np.ravel(RETURNS)
    expected = np.empty(10)
    for members in by_prompt().values():
        for member in members:
            expected[member] = flat[member] - np.mean([flat[other] for other in members if other != member])
    for step in range(6):
        np.testing.assert_allclose(advantages[step], expected.reshape(2, 5)[step // 3], rtol=1e-4, atol=1e-5)


def test_leave_one_out_baseline_is_unbiased():
    """E[(r_i − the others' mean) · s_i] is the covariance of reward and score; with the whole mean, (k−1)/k of it."""
    generator = np.random.default_rng(0)
    score = generator.normal(size=(4000, 4))
    returns = score + generator.normal(size=score.shape)
    prompts = [[str(group)] * 4 for group in range(4000)]
    advantages = LeaveOneOutAdvantage()(rollout(returns.reshape(1, -1), np.reshape(prompts, (1, -1)), steps=1))
    assert float((advantages.numpy().ravel() * score.ravel()).mean()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("estimator", [GroupRelativeAdvantage(), LeaveOneOutAdvantage()])
def test_prompt_that_is_alone_is_refused(estimator):
    with pytest.raises(ValueError, match="needs at least 2 episodes per prompt .* 'a dog': .*samples_per_prompt to 2"):
        estimator(rollout([1.0, 2.0, 3.0], ["a cat", "a cat", "a dog"]))
    with pytest.raises(ValueError, match="needs every episode's prompt"):
        estimator(rollout([1.0, 2.0], [None, None]))
    with pytest.raises(ValueError, match="n_steps=3 cuts episodes"):
        estimator(rollout([1.0, 2.0], ["a cat", "a cat"], last_dones=False))


@pytest.mark.parametrize(
    "estimator", [GroupRelativeAdvantage(), GroupRelativeAdvantage("batch"), LeaveOneOutAdvantage()]
)
def test_equal_rewards_give_no_advantage(estimator):
    assert not estimator(rollout([3.0, 3.0, 3.0], ["a cat"] * 3)).any()


def test_raw_return_is_the_return_of_the_episode():
    advantages = RawReturn()(rollout(RETURNS, PROMPTS))
    assert advantages[:3].tolist() == [RETURNS[0]] * 3
    assert advantages[3:].tolist() == [RETURNS[1]] * 3


def test_critics_targets_are_stable_baselines3s_returns_at_lambda_1():
    generator = np.random.default_rng(1)
    theirs = RolloutBuffer(12, BOX, BOX, "cpu", gae_lambda=1.0, gamma=0.9, n_envs=3)
    mine = TensorRolloutBuffer(12, BOX, BOX, "cpu", gamma=0.9, n_envs=3)
    starts = np.ones(3, np.bool_)
    for _ in range(12):
        rewards = generator.normal(size=3).astype(np.float32)
        values = torch.as_tensor(generator.normal(size=3), dtype=torch.float32)
        observation = torch.zeros(3, 1)
        theirs.add(observation.numpy(), observation.numpy(), rewards, starts.astype(np.float32), values, torch.zeros(3))
        mine.add(observation, observation, rewards, starts, values, torch.zeros(3), [None] * 3)
        starts = generator.random(3) < 0.25
    last_values = torch.as_tensor(generator.normal(size=3), dtype=torch.float32)
    theirs.compute_returns_and_advantage(last_values, starts)
    mine.finish(last_values, starts)
    mine.set_monte_carlo_returns()
    assert starts.any()
    assert not starts.all()
    np.testing.assert_allclose(mine.returns.numpy(), theirs.returns, rtol=1e-4, atol=1e-5)


def test_final_steps_are_those_that_end_an_episode():
    assert (rollout(RETURNS, PROMPTS).final_steps() // 5).tolist() == [2] * 5 + [5] * 5
    assert (rollout(RETURNS, PROMPTS, last_dones=False).final_steps() // 5).tolist() == [2] * 5


@pytest.mark.parametrize("estimator", [GroupRelativeAdvantage(), BatchAdvantage(), PerPromptAdvantage(4, 2)])
def test_advantages_do_not_depend_on_the_scale_of_the_rewards(estimator):
    returns, prompts = np.array([[1.0, 2.0, 4.0, 5.0]]), ["a cat"] * 4
    expected = (returns - returns.mean()) / returns.std()
    for scale in (1e-30, 1e-6, 1.0, 1e30):
        advantages = copy.deepcopy(estimator)(rollout(returns * scale, prompts))
        np.testing.assert_allclose(advantages[-1:], expected, rtol=1e-6)


@pytest.mark.parametrize("estimator", [GroupRelativeAdvantage(), BatchAdvantage(), PerPromptAdvantage(4, 2)])
def test_close_rewards_are_standardised_exactly_and_equal_ones_give_0(estimator):
    prompts = ["a cat"] * 4
    close = copy.deepcopy(estimator)(rollout([[0.5, 0.50001, 0.5, 0.50001]], prompts))
    np.testing.assert_allclose(close[-1].abs(), 1.0, rtol=1e-3)
    for value in (0.0, 0.1, 1e30, 1e-30, -3.3):
        assert not copy.deepcopy(estimator)(rollout([[value] * 4], prompts)).any()
    rounding = np.nextafter(np.float32(0.1), np.float32(1))
    assert not copy.deepcopy(estimator)(rollout([[0.1, rounding, 0.1, 0.1]], prompts)).any()


def test_generalized_advantages_of_huge_and_tiny_rewards_are_finite():
    returns, prompts = np.array([[1.0, 2.0, 4.0, 5.0]]), ["a cat"] * 4
    expected = GeneralizedAdvantage()(rollout(returns, prompts))
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(GeneralizedAdvantage()(rollout(returns * scale, prompts)), expected)
