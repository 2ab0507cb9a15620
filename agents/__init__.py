"""Reinforcement learning for the denoising MDP, on Stable-Baselines3: policy, environment adapter and algorithms."""

from agents.algorithms.advantages import (
    AdvantageEstimator,
    BatchAdvantage,
    GeneralizedAdvantage,
    GroupRelativeAdvantage,
    LeaveOneOutAdvantage,
    PerPromptAdvantage,
    RawReturn,
)
from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rwr import RWR
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.buffer import TensorRolloutBuffer, Transitions
from agents.rollout.vec_env import VectorEnvAdapter

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
