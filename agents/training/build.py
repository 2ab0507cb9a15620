"""From a configuration's words to an algorithm and its parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from agents.algorithms.advantages import (
    AdvantageEstimator,
    BatchAdvantage,
    GeneralizedAdvantage,
    GroupRelativeAdvantage,
    LeaveOneOutAdvantage,
    PerPromptAdvantage,
)
from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rwr import RWR
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.policy.diffusion_policy import DiffusionPolicy


def build_algorithm(config: TrainConfig, env: VecEnv, processes: Processes) -> TensorOnPolicyAlgorithm:
    """Make the algorithm that a checked configuration names, with a `DiffusionPolicy` on `env`.

    Of several processes each has its part of the batch in `env`.
    """
    task, training, optimizer = config.task, config.training, config.optimizer
    total = training.samples_per_iteration
    common: dict[str, Any] = {
        "learning_rate": _learning_rate(config),
        "n_steps": task.num_inference_steps * total // (env.num_envs * processes.count),
        "micro_batch_size": training.train_batch_size,
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "max_grad_norm": optimizer.max_grad_norm,
        "target_kl": training.target_kl,
        "kl_coef": training.kl_coef,
        "timestep_fraction": training.timestep_fraction,
        "timestep_window": training.timestep_window,
        "recompute_log_probs": training.recompute_log_probs,
        "ema_decay": training.ema_decay,
        "advantage": _advantage(config),
        "non_finite_rewards": training.non_finite_rewards,
        "policy_kwargs": _policy_arguments(config),
        "stats_window_size": total,
        "processes": processes,
        "seed": config.run.seed,
        "device": env.get_attr("device")[0],
    }
    if training.algorithm == "reinforce":
        return REINFORCE(DiffusionPolicy, env, **common)
    if training.algorithm == "ppo":
        batch_size = total * config.trained_steps // training.updates_per_iteration
        common |= {"batch_size": batch_size, "n_epochs": training.epochs}
        return PPO(DiffusionPolicy, env, clip_range=training.clip_range, **common)
    sparse = training.algorithm == "rwr_sparse"
    return RWR(
        DiffusionPolicy,
        env,
        batch_size=None if sparse else total // training.updates_per_iteration,
        n_epochs=training.epochs,
        weighting="percentile" if sparse else "exponential",
        beta=training.rwr_beta,
        percentile=training.rwr_percentile,
        **common,
    )


def _advantage(config: TrainConfig) -> AdvantageEstimator:
    training = config.training
    clip = training.advantage_clip
    name = training.advantage or ("gae" if config.policy.critic else "per_prompt")
    estimators: dict[str, Callable[[], AdvantageEstimator]] = {
        "per_prompt": lambda: PerPromptAdvantage(training.stat_buffer_size, training.stat_min_count, clip),
        "batch": lambda: BatchAdvantage(clip),
        "group": lambda: GroupRelativeAdvantage(clip=clip),
        "leave_one_out": LeaveOneOutAdvantage,
        "gae": GeneralizedAdvantage,
    }
    return estimators[name]()


def _learning_rate(config: TrainConfig) -> float | Callable[[float], float]:
    """Return the rate, or for a falling one a function of the remaining progress, which is 0 in the last iteration.

    Iteration `i` of `n`, counted from 1, has progress `1 - i / n` left, so the first one gets the whole rate.
    """
    rate, last = config.learning_rate, config.iterations
    if config.optimizer.learning_rate_schedule == "constant":
        return rate
    if config.optimizer.learning_rate_schedule == "cosine":
        return lambda remaining: rate * (1 - math.cos(math.pi * (remaining + 1 / last))) / 2
    return lambda remaining: rate * (remaining + 1 / last)


def _policy_arguments(config: TrainConfig) -> dict[str, Any]:
    optimizer = config.optimizer
    return {
        **vars(config.policy),
        "optimizer_kwargs": {
            "betas": (optimizer.adam_beta1, optimizer.adam_beta2),
            "eps": optimizer.adam_epsilon,
            "weight_decay": optimizer.weight_decay,
        },
    }
