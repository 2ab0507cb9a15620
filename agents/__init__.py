"""Reinforcement learning for the denoising MDP, on Stable-Baselines3: policy, environment adapter and algorithms."""

from agents.advantages import AdvantageEstimator, BatchAdvantage, GeneralizedAdvantage, PerPromptAdvantage
from agents.diffusion_policy import DiffusionPolicy
from agents.ppo import PPO
from agents.rollout_buffer import TensorRolloutBuffer
from agents.vec_env import VectorEnvAdapter

__all__ = [
    "PPO",
    "AdvantageEstimator",
    "BatchAdvantage",
    "DiffusionPolicy",
    "GeneralizedAdvantage",
    "PerPromptAdvantage",
    "TensorRolloutBuffer",
    "VectorEnvAdapter",
]
