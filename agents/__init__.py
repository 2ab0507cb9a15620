"""Reinforcement learning for diffusion models (ddpo-env): policy, algorithms and training runs, on Stable-Baselines3.

A vectorized denoising environment comes in, a trained `DiffusionPolicy` goes out. Nothing heavy is imported before a
public name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.algorithms.advantages import (
        AdvantageEstimator,
        BatchAdvantage,
        DecoupledAdvantage,
        GeneralizedAdvantage,
        GroupRelativeAdvantage,
        LeaveOneOutAdvantage,
        PerPromptAdvantage,
        RawReturn,
    )
    from agents.algorithms.draft import DRaFT
    from agents.algorithms.forward.awm import AWM
    from agents.algorithms.forward.dpo import DPO
    from agents.algorithms.forward.nft import NFT
    from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
    from agents.algorithms.options import UpdateOptions
    from agents.algorithms.policy_gradient.grpo import GRPO
    from agents.algorithms.policy_gradient.ppo import PPO
    from agents.algorithms.policy_gradient.reinforce import REINFORCE
    from agents.algorithms.rwr import RWR
    from agents.config.presets import preset_config
    from agents.config.train_config import TrainConfig, train_config
    from agents.distributed import Maximum
    from agents.evaluation.evaluate import Evaluation, evaluate
    from agents.policy.abilities import PolicyAbilities
    from agents.policy.diffusion_policy import DiffusionPolicy
    from agents.policy.options import PolicyOptions
    from agents.rollout.buffer import TensorRolloutBuffer, Transitions
    from agents.rollout.vec_env import VectorEnvAdapter
    from agents.training.preparation import prepare_run, run_training
    from agents.training.result import RunResult
    from agents.training.run import Run, RunListener

_MODULES = {
    "agents.algorithms.advantages": (
        "AdvantageEstimator",
        "BatchAdvantage",
        "DecoupledAdvantage",
        "GeneralizedAdvantage",
        "GroupRelativeAdvantage",
        "LeaveOneOutAdvantage",
        "PerPromptAdvantage",
        "RawReturn",
    ),
    "agents.algorithms.draft": ("DRaFT",),
    "agents.algorithms.forward.awm": ("AWM",),
    "agents.algorithms.forward.dpo": ("DPO",),
    "agents.algorithms.forward.nft": ("NFT",),
    "agents.algorithms.on_policy": ("TensorOnPolicyAlgorithm",),
    "agents.algorithms.options": ("UpdateOptions",),
    "agents.algorithms.policy_gradient.grpo": ("GRPO",),
    "agents.algorithms.policy_gradient.ppo": ("PPO",),
    "agents.algorithms.policy_gradient.reinforce": ("REINFORCE",),
    "agents.algorithms.rwr": ("RWR",),
    "agents.config.presets": ("preset_config",),
    "agents.config.train_config": ("TrainConfig", "train_config"),
    "agents.distributed": ("Maximum",),
    "agents.evaluation.evaluate": ("Evaluation", "evaluate"),
    "agents.policy.abilities": ("PolicyAbilities",),
    "agents.policy.diffusion_policy": ("DiffusionPolicy",),
    "agents.policy.options": ("PolicyOptions",),
    "agents.rollout.buffer": ("TensorRolloutBuffer", "Transitions"),
    "agents.rollout.vec_env": ("VectorEnvAdapter",),
    "agents.training.preparation": ("prepare_run", "run_training"),
    "agents.training.result": ("RunResult",),
    "agents.training.run": ("Run", "RunListener"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AWM",
    "DPO",
    "GRPO",
    "NFT",
    "PPO",
    "REINFORCE",
    "RWR",
    "AdvantageEstimator",
    "BatchAdvantage",
    "DRaFT",
    "DecoupledAdvantage",
    "DiffusionPolicy",
    "Evaluation",
    "GeneralizedAdvantage",
    "GroupRelativeAdvantage",
    "LeaveOneOutAdvantage",
    "Maximum",
    "PerPromptAdvantage",
    "PolicyAbilities",
    "PolicyOptions",
    "RawReturn",
    "Run",
    "RunListener",
    "RunResult",
    "TensorOnPolicyAlgorithm",
    "TensorRolloutBuffer",
    "TrainConfig",
    "Transitions",
    "UpdateOptions",
    "VectorEnvAdapter",
    "evaluate",
    "prepare_run",
    "preset_config",
    "run_training",
    "train_config",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used (PEP 562)."""
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
