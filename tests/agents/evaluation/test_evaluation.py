"""Held-out images: the same for the same arguments, and training is not affected by them."""

import random

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from helpers.micro_agents import STEPS, brightness, micro_env, micro_policy, stir

from agents.evaluation.evaluate import evaluate, evaluation_prompts

PROMPTS = ["a cat", "a dog", "a fox", "a bee", "an ant", "a cow", "a rat"]


@pytest.fixture(scope="module")
def env(micro_pipeline_folder):
    return micro_env(micro_pipeline_folder, 3, autoreset_mode=AutoresetMode.DISABLED)


def test_same_arguments_give_the_same_images_whatever_training_did(env):
    policy = stir(micro_policy(env))
    first = evaluate(policy, env, PROMPTS, seed=5)
    torch.manual_seed(123)
    env.reset(seed=77)
    again = evaluate(policy, env, PROMPTS, seed=5)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.rewards, again.rewards)
    other = evaluate(policy, env, PROMPTS, seed=6)
    assert not np.array_equal(first.images, other.images)


def test_random_state_and_mode_of_training_stay_as_they_were(env):
    policy = micro_policy(env)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for mode in (True, False):
        policy.set_training_mode(mode)
        evaluate(policy, env, PROMPTS[:2], seed=5)
        assert policy.training == policy.denoiser.training == mode
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])


def test_error_in_the_reward_leaves_the_random_state_too(env, monkeypatch):
    monkeypatch.setattr(env, "reward", lambda images, prompts, metadata: [float("nan")] * 3)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="must be finite"):
        evaluate(micro_policy(env), env, PROMPTS, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_number_of_samples_need_not_be_a_multiple_of_the_sub_environments(env, samples):
    policy = micro_policy(env)
    evaluation = evaluate(policy, env, PROMPTS[:samples], seed=5)
    assert evaluation.prompts == PROMPTS[:samples]
    assert evaluation.images.shape == (samples, 32, 32, 3)
    np.testing.assert_allclose(evaluation.rewards, brightness(evaluation.images, [], []))
    assert len({image.tobytes() for image in evaluation.images}) == samples
    whole = evaluate(policy, env, PROMPTS, seed=5)
    complete = samples - samples % 3
    np.testing.assert_array_equal(evaluation.images[:complete], whole.images[:complete])


def test_sample_i_starts_from_seed_plus_i(env, monkeypatch):
    policy, starts = micro_policy(env), []
    distribution = policy.get_distribution

    def watch(observation):
        starts.append(observation["latents"])
        return distribution(observation)

    monkeypatch.setattr(policy, "get_distribution", watch)
    evaluate(policy, env, PROMPTS, seed=40)
    noise = torch.cat(starts[::STEPS])[: len(PROMPTS)]
    for index, latents in enumerate(noise):
        expected = np.random.default_rng(40 + index).standard_normal(latents.shape, np.float32)
        np.testing.assert_array_equal(latents, expected)


def test_details_of_the_reward_have_one_value_per_sample(env, monkeypatch):
    def detailed(images, prompts, metadata):
        return brightness(images, prompts, metadata), {"length": [len(prompt) for prompt in prompts]}

    monkeypatch.setattr(env, "reward", detailed)
    evaluation = evaluate(micro_policy(env), env, PROMPTS, seed=5)
    assert evaluation.details == {"length": [len(prompt) for prompt in PROMPTS]}


def test_metadata_reaches_the_reward_also_from_a_function_of_prompts(micro_pipeline_folder):
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(zip(prompts, (one["number"] for one in metadata), strict=True))
        return np.zeros(len(images))

    def numbered(rng):
        number = int(rng.integers(1000))
        return f"{number} cats", {"number": number}

    env = micro_env(micro_pipeline_folder, 2, prompts=numbered, reward=reward, autoreset_mode=AutoresetMode.DISABLED)
    prompts = evaluation_prompts(env, 3, seed=8)
    assert prompts == evaluation_prompts(env, 3, seed=8)
    assert len({number for number, _ in prompts}) == 3
    evaluate(micro_policy(env), env, prompts, seed=0)
    assert [(prompt, number) for prompt, number in seen[:3]] == [(prompt, meta["number"]) for prompt, meta in prompts]


def test_finite_prompt_set_is_gone_through_before_it_repeats(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder, prompts=["a cat", ("a dog", {"legs": 4}), "a fox"])
    prompts = evaluation_prompts(env, 7, seed=1)
    assert sorted(prompt for prompt, _ in prompts[:3]) == ["a cat", "a dog", "a fox"]
    assert prompts[:3] == prompts[3:6]
    assert dict(prompts)["a dog"] == {"legs": 4}
    assert any(evaluation_prompts(env, 3, seed=seed) != prompts[:3] for seed in range(2, 6))


def test_wrong_environment_and_no_prompts_are_refused(env, micro_pipeline_folder):
    policy = micro_policy(env)
    with pytest.raises(ValueError, match="env must have autoreset_mode 'Disabled'; got 'SameStep'"):
        evaluate(policy, micro_env(micro_pipeline_folder), PROMPTS, seed=0)
    with pytest.raises(ValueError, match="prompts must hold at least one prompt; got none"):
        evaluate(policy, env, [], seed=0)
