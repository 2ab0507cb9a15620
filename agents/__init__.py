"""Reinforcement learning for the denoising MDP, on Stable-Baselines3: policy, environment adapter and algorithms."""

from agents.advantages import (
    AdvantageEstimator,
    BatchAdvantage,
    GeneralizedAdvantage,
    GroupRelativeAdvantage,
    LeaveOneOutAdvantage,
    PerPromptAdvantage,
    RawReturn,
)
from agents.diffusion_policy import DiffusionPolicy
from agents.on_policy import TensorOnPolicyAlgorithm
from agents.ppo import PPO
from agents.reinforce import REINFORCE
from agents.rollout_buffer import TensorRolloutBuffer, Transitions
from agents.rwr import RWR
from agents.vec_env import VectorEnvAdapter

__all__ = [
    "PPO",
    "REINFORCE",
    "RWR",
    "AdvantageEstimator",
    "BatchAdvantage",
    "DiffusionPolicy",
    "GeneralizedAdvantage",
    "GroupRelativeAdvantage",
    "LeaveOneOutAdvantage",
    "PerPromptAdvantage",
    "RawReturn",
    "TensorOnPolicyAlgorithm",
    "TensorRolloutBuffer",
    "Transitions",
    "VectorEnvAdapter",
]
