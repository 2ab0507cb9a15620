"""Rollouts with given returns."""

import numpy as np
import torch
from gymnasium import spaces

from agents.rollout.buffer import TensorRolloutBuffer

BOX = spaces.Box(-1, 1, (1,), np.float32)


def rollout(returns, prompts, steps=3, last_dones=True):
    """Whole episodes of `steps` steps, as many one after another as `returns` has rows; rewards come at the end."""
    returns = np.atleast_2d(np.asarray(returns, np.float64))
    episodes, num_envs = returns.shape
    buffer = TensorRolloutBuffer(steps * episodes, BOX, BOX, "cpu", n_envs=num_envs)
    prompts = np.asarray(prompts, dtype=object).reshape(returns.shape)
    zeros = torch.zeros(num_envs)
    for episode in range(episodes):
        for step in range(steps):
            rewards = returns[episode] if step == steps - 1 else np.zeros(num_envs)
            starts = np.full(num_envs, step == 0)
            observation = torch.zeros(num_envs, 1)
            buffer.add(observation, observation, rewards, starts, zeros, zeros, list(prompts[episode]))
    buffer.finish(zeros, np.full(num_envs, last_dones))
    return buffer
