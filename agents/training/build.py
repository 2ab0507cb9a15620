"""From a resolved configuration to an algorithm with its policy, advantage estimator and learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pkgutil import resolve_name
from typing import Any

from agents.algorithms.advantages import (
    AdvantageEstimator,
    BatchAdvantage,
    DecoupledAdvantage,
    GeneralizedAdvantage,
    GroupRelativeAdvantage,
    LeaveOneOutAdvantage,
    PerPromptAdvantage,
)
from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter
from ddpo_env.models import abilities_of
from rewards import weights_by_term


def build_algorithm(config: TrainConfig, env: VectorEnvAdapter, processes: Processes) -> TensorOnPolicyAlgorithm:
    """Make the algorithm that a resolved configuration names, with a `DiffusionPolicy` on `env`.

    With several processes, `env` holds this process's sub-environments.
    """
    training, total, traits = config.training, config.samples_per_iteration, config.traits
    context_key = _context_key(env)
    config.check_prompt_images(context_key == "context")  # known before only of models that are not on the Hub
    arguments: dict[str, Any] = {
        "learning_rate": _learning_rate(config),
        "n_steps": config.num_inference_steps * total // (env.num_envs * processes.count),
        "micro_batch_size": training.train_batch_size or None,
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "max_grad_norm": config.optimizer.max_grad_norm,
        "non_finite_rewards": training.non_finite_rewards,
        "policy_kwargs": _policy_arguments(config),
        "stats_window_size": total,
        "processes": processes,
        "seed": config.seed,
        "context_key": context_key,
        "device": env.denoising_env.device if env.denoising_env is not None else "auto",
        **asdict(config.update),
    }
    if not traits.differentiates_reward:
        arguments["advantage"] = _advantage(config)
    if "epochs" not in traits.always_one:
        arguments["n_epochs"] = training.epochs
    if "updates_per_iteration" not in traits.always_one:
        trained = config.trained_samples * (_trained_steps(config, env) if traits.trains_on_steps else 1)
        arguments["batch_size"] = math.ceil(trained / training.updates_per_iteration)
    values = vars(training) | {"rwr_per_prompt": "exponential_per_prompt" if training.rwr_per_prompt else "exponential"}
    own = {argument: values[setting] for setting, argument in traits.arguments.items()}
    algorithm_class: type[TensorOnPolicyAlgorithm] = resolve_name(f"agents.algorithms.{traits.made_by}")
    return algorithm_class(DiffusionPolicy, env, **arguments, **traits.fixed, **own)


def _context_key(env: VectorEnvAdapter) -> str:
    """Return where the infos tell prompts apart: by their text, unless the model takes more than that, an image."""
    fields = () if env.denoising_env is None else abilities_of(env.denoising_env.model).prompt_fields
    return "context" if fields else "prompt"


def _trained_steps(config: TrainConfig, env: VectorEnvAdapter) -> int:
    """Return how many steps of a trajectory are trained on: without those that have no noise with this model."""
    if env.denoising_env is None:
        return config.trained_steps
    table = config.policy.sampler_table(env.denoising_env.model, config.num_inference_steps)
    return config.count_trained_steps(table.is_stochastic.numpy())


def _advantage(config: TrainConfig) -> AdvantageEstimator:
    training = config.training
    clip = training.advantage_clip
    estimators: dict[str | None, Callable[[], AdvantageEstimator]] = {
        "per_prompt": lambda: PerPromptAdvantage(training.stat_buffer_size, training.stat_min_count, clip),
        "batch": lambda: BatchAdvantage(clip),
        "group": lambda: GroupRelativeAdvantage(clip=clip),
        "dr_grpo": lambda: GroupRelativeAdvantage("none", math.inf),
        "global_std": lambda: GroupRelativeAdvantage("batch", clip),
        "gdpo": lambda: DecoupledAdvantage(weights_by_term(config.reward, "advantage gdpo"), clip),
        "leave_one_out": LeaveOneOutAdvantage,
        "gae": GeneralizedAdvantage,
    }
    return estimators[training.advantage]()


def _learning_rate(config: TrainConfig) -> float | Callable[[float], float]:
    """Return the rate, or for a falling one a function of the remaining progress of the schedule.

    Iteration `i` of the `n` that were planned, counted from 1, has progress `1 - (i - 1) / n` left, so the first one
    gets the whole rate. Later iterations, which a resumed run may add, get that of the last planned one.
    """
    rate, least = config.learning_rate, 1 / config.schedule_length
    assert rate is not None
    if config.optimizer.learning_rate_schedule == "constant":
        return rate
    if config.optimizer.learning_rate_schedule == "cosine":
        return lambda remaining: rate * (1 - math.cos(math.pi * max(remaining, least))) / 2
    return lambda remaining: rate * max(remaining, least)


def _policy_arguments(config: TrainConfig) -> dict[str, Any]:
    optimizer = config.optimizer
    return {
        **asdict(config.policy),
        "optimizer_kwargs": {
            "betas": (optimizer.adam_beta1, optimizer.adam_beta2),
            "eps": optimizer.adam_epsilon,
            "weight_decay": optimizer.weight_decay,
        },
    }
