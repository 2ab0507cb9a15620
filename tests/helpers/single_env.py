"""One episode of denoising at a time, as `gym.make("DDPO-SD-v0")` has it, and random actions for it."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

STEPS = 4
PROMPTS = ["a cat", "an ant", "a dog", "a fox"]
MakeEnv = Callable[..., gym.Env[Any, Any]]


def random_actions(env: gym.Env[Any, Any], seed: int = 0, steps: int = STEPS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, *env.action_space.shape), np.float32)


def episode(env: gym.Env[Any, Any], seed: int = 0, options: dict[str, Any] | None = None) -> list[Any]:
    """Every (observation, reward, terminated, truncated, info), that of `reset` without the middle three."""
    return [env.reset(seed=seed, options=options), *map(env.step, random_actions(env))]
