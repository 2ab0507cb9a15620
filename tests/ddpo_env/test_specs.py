"""Environment specs as experiment trackers use them: plain values, and a round trip through JSON."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from diffusers import StableDiffusionPipeline
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

ID = "ddpo_env:DDPO-SD-v0"


def test_a_spec_survives_json(micro_pipeline_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, safety_checker=None)
    for model in ("tiny", micro_pipeline_folder, pipeline):
        env = gym.make(ID, num_inference_steps=2, model=model)
        assert env.spec is not None
        again = gym.make(EnvSpec.from_json(env.spec.to_json()))
        assert again.observation_space == env.observation_space
        assert again.reset(seed=0)[0]["latents"].shape == env.reset(seed=0)[0]["latents"].shape


def test_a_spec_of_a_batch_survives_json(micro_pipeline_folder: Path) -> None:
    settings: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP, "model": micro_pipeline_folder}
    envs = gym.make_vec(ID, num_envs=2, num_inference_steps=2, **settings)
    assert envs.spec is not None
    again = gym.make_vec(EnvSpec.from_json(envs.spec.to_json()), num_envs=2)
    assert again.unwrapped.autoreset_mode is AutoresetMode.SAME_STEP  # type: ignore[attr-defined]
    assert again.single_observation_space == envs.single_observation_space
    assert gym.make_vec(envs.spec).num_envs == 2


def test_a_time_limit_of_a_batch_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"max_episode_steps must be None, .* num_inference_steps steps; got 1"):
        gym.make_vec(ID, num_envs=2, num_inference_steps=2, max_episode_steps=1)
