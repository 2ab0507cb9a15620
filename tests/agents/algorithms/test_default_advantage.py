"""The estimator of an algorithm that is made without one: with a critic GAE, else one that compares samples."""

import numpy as np
import pytest
import torch
from helpers.algorithms import collected, denoising, denoising_ppo
from helpers.micro_agents import STEPS

from agents import (
    AWM,
    DPO,
    GRPO,
    NFT,
    PPO,
    REINFORCE,
    RWR,
    GeneralizedAdvantage,
    GroupRelativeAdvantage,
    PerPromptAdvantage,
)


@pytest.mark.parametrize("kind", [NFT, AWM, DPO, PPO, REINFORCE])
def test_weight_of_a_step_depends_on_its_sample_alone_without_a_critic(micro_pipeline_folder, kind):
    model = collected(denoising(kind, micro_pipeline_folder, advantage=None, gamma=0.99, gae_lambda=0.95))
    rollout = model.rollout_buffer
    assert isinstance(model.advantage, PerPromptAdvantage)
    assert torch.equal(rollout.advantages, rollout.advantages[:1].expand(STEPS, -1))
    rewards = rollout.rewards[-1]
    np.testing.assert_allclose(rollout.advantages[0], (rewards - rewards.mean()) / rewards.std(), rtol=1e-4, atol=1e-5)


def test_samples_of_the_default_are_not_standardised_again(micro_pipeline_folder):
    assert denoising_ppo(micro_pipeline_folder, advantage=None).normalize_advantage is False
    assert denoising_ppo(micro_pipeline_folder, advantage=None, normalize_advantage=True).normalize_advantage


@pytest.mark.parametrize("kind", [NFT, PPO, REINFORCE, RWR])
def test_policy_with_a_critic_keeps_gae(micro_pipeline_folder, kind):
    model = denoising(kind, micro_pipeline_folder, policy={"critic": True}, advantage=None)
    assert model.advantage == GeneralizedAdvantage(normalize=kind is not PPO)
    if kind is PPO:
        assert model.normalize_advantage


def test_stock_policy_keeps_gae_and_grpo_its_groups(micro_pipeline_folder):
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    assert model.advantage == GeneralizedAdvantage(normalize=False)
    assert model.normalize_advantage
    assert isinstance(denoising(GRPO, micro_pipeline_folder, advantage=None).advantage, GroupRelativeAdvantage)


@pytest.mark.parametrize("kind", [NFT, PPO, RWR])
def test_gae_without_a_critic_is_refused(micro_pipeline_folder, kind):
    with pytest.raises(
        ValueError, match=r"advantage must not be GeneralizedAdvantage without a critic: .*critic.*True"
    ):
        denoising(kind, micro_pipeline_folder, advantage=GeneralizedAdvantage())


@pytest.mark.parametrize("arguments", [{"advantage": None}, {"advantage": PerPromptAdvantage()}])
def test_rollout_that_cuts_episodes_is_refused_before_it_is_sampled(micro_pipeline_folder, arguments):
    message = (
        f"n_steps must be a multiple of {STEPS}, the length of an episode, with PerPromptAdvantage; got 12: 10 and 15"
    )
    with pytest.raises(ValueError, match=message):
        denoising_ppo(micro_pipeline_folder, n_steps=12, **arguments)
    denoising_ppo(micro_pipeline_folder, n_steps=12, advantage=None, policy={"critic": True})


def test_statistics_of_the_default_are_saved(micro_pipeline_folder, tmp_path):
    model = denoising(NFT, micro_pipeline_folder, advantage=None).learn(6 * STEPS)
    assert model.advantage.history
    model.save(tmp_path / "model")
    loaded = NFT.load(tmp_path / "model", env=model.env, device="cpu")
    assert loaded.advantage.state_dict() == model.advantage.state_dict()
