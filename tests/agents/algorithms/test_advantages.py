"""How good an action was: against DDPO's own bookkeeping written anew, and Stable-Baselines3's GAE."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers.rollouts import BOX, rollout
from stable_baselines3.common.buffers import RolloutBuffer

from agents.algorithms.advantages import BatchAdvantage, GeneralizedAdvantage, PerPromptAdvantage
from agents.rollout.buffer import TensorRolloutBuffer


def ddpo_advantages(memory, returns, prompts, buffer_size, min_count, clip):
    """Black et al. 2023, appendix C, plainly: every prompt keeps its last rewards in a list."""
    for prompt, value in zip(prompts, returns, strict=True):
        memory[prompt] = [*memory[prompt], value][-buffer_size:]
    advantages = []
    for prompt, value in zip(prompts, returns, strict=True):
        known = memory[prompt] if len(memory[prompt]) >= min_count else returns
        mean = sum(known) / len(known)
        variance = sum((one - mean) ** 2 for one in known) / len(known)
        advantages.append(max(-clip, min(clip, (value - mean) / (variance**0.5 + 1e-6))))
    return advantages


@pytest.mark.parametrize(("buffer_size", "min_count", "clip"), [(16, 8, 5.0), (4, 2, 1.2), (32, 12, 10.0)])
def test_per_prompt_equals_an_independent_implementation_over_iterations(buffer_size, min_count, clip):
    estimator = PerPromptAdvantage(buffer_size, min_count, clip)
    memory = defaultdict(list)
    rng = np.random.default_rng(0)
    own_statistics = 0
    for _ in range(6):
        returns = rng.normal(size=(2, 5)) * 10 + rng.integers(3)
        prompts = rng.choice(["a cat", "a dog", "an ant"], size=(2, 5))
        expected = ddpo_advantages(memory, returns.ravel(), prompts.ravel(), buffer_size, min_count, clip)
        advantages = estimator(rollout(returns.astype(np.float32), prompts))
        assert advantages.shape == (6, 5)
        for step in range(6):
            np.testing.assert_allclose(advantages[step], np.reshape(expected, (2, 5))[step // 3], rtol=1e-4, atol=1e-4)
        own_statistics += sum(len(memory[prompt]) >= min_count for prompt in memory)
    assert own_statistics > 0
    assert {prompt: len(values) for prompt, values in estimator.history.items()} == {
        prompt: len(values) for prompt, values in memory.items()
    }


@pytest.mark.parametrize("estimator", [PerPromptAdvantage(8, 2), BatchAdvantage()])
def test_integer_rewards_keep_their_fractions(estimator):
    advantages = estimator(rollout(np.array([1, 2, 3, 4]), ["a cat"] * 4))
    np.testing.assert_allclose(advantages[0], (np.array([1, 2, 3, 4]) - 2.5) / np.sqrt(1.25), rtol=1e-5)


def test_equal_rewards_give_no_advantage():
    for estimator in (PerPromptAdvantage(8, 2), BatchAdvantage()):
        assert not estimator(rollout([3.0, 3.0, 3.0], ["a cat"] * 3)).any()


def test_prompts_are_judged_by_their_own_rewards():
    returns, prompts = [1.0, 2.0, 101.0, 102.0], ["a cat", "a cat", "a dog", "a dog"]
    np.testing.assert_allclose(PerPromptAdvantage(8, 2)(rollout(returns, prompts))[0], [-1, 1, -1, 1], rtol=1e-4)
    np.testing.assert_allclose(BatchAdvantage()(rollout(returns, prompts))[0], [-1, -1, 1, 1], atol=0.05)


def test_batch_is_standardised_and_clipped():
    returns = np.array([0.0] * 9 + [10.0])
    advantages = BatchAdvantage(clip=2.0)(rollout(returns, [None] * 10))
    np.testing.assert_allclose(advantages[0, :9], -1 / 3, rtol=1e-5)
    assert (advantages[:, 9] == 2.0).all()


@pytest.mark.parametrize(
    ("cat", "dog"), [("a cat", "a dog"), ("1", 1), (1, 2.5), (np.int64(1), np.int64(2)), (np.str_("a cat"), "a dog")]
)
def test_statistics_survive_being_saved(cat, dog):
    first, second = PerPromptAdvantage(4, 2), PerPromptAdvantage(4, 2)
    first(rollout([1.0, 2.0, 5.0], [cat, cat, dog]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.history == first.history
    more = rollout([4.0, 7.0, 1.0], [dog, cat, cat])
    assert torch.equal(first(more), second(more))
    assert not torch.equal(second(more), PerPromptAdvantage(4, 2)(more))


def test_context_that_cannot_be_saved_is_refused():
    with pytest.raises(ValueError, match="context_key must name text or numbers .*; got .*'a cat'"):
        PerPromptAdvantage(4, 2)(rollout([1.0, 2.0], [frozenset(["a cat"]), "a dog"]))


@pytest.mark.parametrize("estimator", [PerPromptAdvantage(8, 2), BatchAdvantage()])
def test_cut_episodes_are_refused(estimator):
    with pytest.raises(ValueError, match=r"n_steps=3 cuts episodes, .*num_inference_steps"):
        estimator(rollout([1.0, 2.0], ["a cat"] * 2, last_dones=False))
    late = rollout([1.0, 2.0], ["a cat"] * 2)
    late.episode_starts[0] = False
    with pytest.raises(ValueError, match="cuts episodes"):
        estimator(late)


def test_episodes_without_a_prompt_are_refused():
    with pytest.raises(ValueError, match=r"PerPromptAdvantage needs every episode's prompt.*BatchAdvantage"):
        PerPromptAdvantage(8, 2)(rollout([1.0, 2.0], ["a cat", None]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_count": 1}, "min_count must be between 2 and buffer_size=32; got 1"),
        ({"buffer_size": 4, "min_count": 5}, "min_count must be between 2 and buffer_size=4; got 5"),
        ({"clip": 0.0}, "clip must be above 0; got 0.0"),
        ({"clip": float("nan")}, "clip must be above 0; got nan"),
    ],
)
def test_bad_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PerPromptAdvantage(**arguments)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_stable_baselines3(gamma, gae_lambda):
    steps, num_envs = 40, 3
    expected = RolloutBuffer(steps, BOX, BOX, "cpu", gae_lambda, gamma, num_envs)
    buffer = TensorRolloutBuffer(steps, BOX, BOX, "cpu", gae_lambda, gamma, num_envs)
    rng = np.random.default_rng(0)
    starts = rng.random((steps + 1, num_envs)) < 0.15
    for step in range(steps):
        rewards = rng.normal(size=num_envs).astype(np.float32)
        values, log_prob = (torch.as_tensor(rng.normal(size=num_envs), dtype=torch.float32) for _ in range(2))
        zeros = np.zeros((num_envs, 1), np.float32)
        expected.add(zeros, zeros, rewards, starts[step], values, log_prob)
        tensors = torch.zeros(num_envs, 1), torch.zeros(num_envs, 1)
        buffer.add(*tensors, rewards, starts[step], values[:, None], log_prob, [None] * num_envs)
    last_values = torch.as_tensor(rng.normal(size=(num_envs, 1)), dtype=torch.float32)
    expected.compute_returns_and_advantage(last_values, starts[-1])
    buffer.finish(last_values, starts[-1])
    plain = GeneralizedAdvantage(normalize=False)(buffer)
    np.testing.assert_allclose(plain, expected.advantages, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(buffer.returns, expected.returns, rtol=1e-4, atol=1e-4)
    normalized = GeneralizedAdvantage()(buffer)
    torch.testing.assert_close(normalized, (plain - plain.mean()) / plain.std(), rtol=1e-4, atol=1e-4)


def test_gae_of_a_single_step_is_finite():
    advantages = GeneralizedAdvantage()(rollout([2.0], ["a cat"], steps=1))
    assert torch.equal(advantages, torch.tensor([[2.0]]))
