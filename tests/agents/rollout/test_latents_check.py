"""Wrappers that change actions or latents are refused: the buffer relies on the next latents being the action."""

import gymnasium as gym
import gymnasium.wrappers as wrappers
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from helpers.micro_agents import brightness

import ddpo_env  # noqa: F401  (registers DDPO-SD-v0)
from agents.algorithms.forward.nft import NFT
from agents.algorithms.policy_gradient.ppo import PPO
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter


def halved(observation):
    return {**observation, "latents": observation["latents"] / 2}


WRAPPERS = {
    "rescaled actions": lambda env: wrappers.RescaleAction(env, np.float32(-1), np.float32(1)),
    "transformed actions": lambda env: wrappers.TransformAction(env, lambda action: action * 0.5, env.action_space),
    "transformed latents": lambda env: wrappers.TransformObservation(env, halved, env.observation_space),
}


def trained(folder, wrap, steps, kind=PPO):
    env = gym.make_vec(
        "DDPO-SD-v0",
        2,
        "sync",
        wrappers=[wrap],
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        model=folder,
        reward=brightness,
        num_inference_steps=steps,
        device="cpu",
    )
    policy = {"guidance_scale": 1.0, "lora_rank": 2}
    model = kind(DiffusionPolicy, VectorEnvAdapter(env), n_steps=steps, policy_kwargs=policy, device="cpu")
    return model.learn(2 * steps)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_that_changes_latents_is_refused(micro_pipeline_folder, name, steps):
    with pytest.raises(ValueError, match="env must return the action as the next observation's latents.*wrapper"):
        trained(micro_pipeline_folder, WRAPPERS[name], steps)


def test_wrapper_that_changes_nothing_is_accepted(micro_pipeline_folder):
    assert trained(micro_pipeline_folder, lambda env: env, 3).num_timesteps == 6


CUT = "env must not cut an episode before its sample exists, .*TimeLimit .max_episode_steps of gym.make"


@pytest.mark.parametrize("kind", [PPO, NFT])
def test_episode_that_is_cut_before_its_sample_exists_is_refused(micro_pipeline_folder, kind):
    with pytest.raises(ValueError, match=CUT):
        trained(micro_pipeline_folder, lambda env: wrappers.TimeLimit(env, 2), 3, kind)
    assert trained(micro_pipeline_folder, lambda env: wrappers.TimeLimit(env, 3), 3, kind).num_timesteps == 6


def test_time_limit_of_a_single_environment_is_refused():
    env = gym.make("DDPO-Points-v0", max_episode_steps=2, num_inference_steps=3, device="cpu")
    policy = {"guidance_scale": 1.0, "lora_rank": 0}
    with pytest.raises(ValueError, match=CUT):
        PPO(DiffusionPolicy, env, n_steps=6, policy_kwargs=policy, device="cpu").learn(6)
