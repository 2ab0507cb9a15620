"""Environments of one episode on the micro pipeline, and stock diffusers' own copy of it."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from diffusers import StableDiffusionPipeline
from helpers.single_env import PROMPTS, STEPS, MakeEnv

import ddpo_env  # noqa: F401  registers the environment


@pytest.fixture
def make_env(micro_pipeline_folder: Path) -> MakeEnv:
    def make(**arguments: Any) -> gym.Env[Any, Any]:
        defaults = {"model": str(micro_pipeline_folder), "prompts": PROMPTS, "num_inference_steps": STEPS}
        return gym.make("DDPO-SD-v0", **defaults | arguments)

    return make


@pytest.fixture(scope="module")
def pipeline(micro_pipeline_folder: Path) -> StableDiffusionPipeline:
    """Stock diffusers' own copy, which shares nothing with the package."""
    return StableDiffusionPipeline.from_pretrained(micro_pipeline_folder, safety_checker=None)
