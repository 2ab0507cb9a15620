"""Wrappers that change actions or latents are refused: the buffer relies on the next latents being the action."""

import gymnasium as gym
import gymnasium.wrappers as wrappers
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from helpers.micro_agents import brightness

import ddpo_env  # noqa: F401  (registers DDPO-SD-v0)
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


def trained(folder, wrap, steps):
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
    model = PPO(DiffusionPolicy, VectorEnvAdapter(env), n_steps=steps, gamma=1.0, policy_kwargs=policy, device="cpu")
    return model.learn(2 * steps)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_that_changes_latents_is_refused(micro_pipeline_folder, name, steps):
    with pytest.raises(ValueError, match="env must return the action as the next observation's latents.*wrapper"):
        trained(micro_pipeline_folder, WRAPPERS[name], steps)


def test_wrapper_that_changes_nothing_is_accepted(micro_pipeline_folder):
    assert trained(micro_pipeline_folder, lambda env: env, 3).num_timesteps == 6
