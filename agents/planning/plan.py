"""What a configuration amounts to, in words and numbers, before anything starts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from agents.config.presets import PRESETS, preset_config
from agents.config.train_config import TrainConfig
from rewards.devices import resolve_device


class DenoiserRows(NamedTuple):
    """Rows that the denoiser is called on in a whole run; a guided call has two for each latent.

    Attributes:
        sampling: to draw the samples that are trained on.
        training: forward and backward, in the updates.
        held_out: to draw the held-out pictures.
        measuring: without gradients, to compute log-densities again in half precision, and those of the pretrained
            policy where there is a KL penalty.
    """

    sampling: int
    training: int
    held_out: int
    measuring: int


def describe_plan(
    config: TrainConfig, processes: int = 1, estimate: str | None = None, memory: str | None = None
) -> list[str]:
    """Return the plan of a checked configuration, a line a subject; sizes are in samples, that is in pictures.

    Args:
        config: checked.
        processes: that share the run.
        estimate: how long it will take, in words.
        memory: what a training call holds, in words, where its size was chosen by that.
    """
    task, training = config.task, config.training
    total, steps = training.samples_per_iteration, task.num_inference_steps
    batches, groups = total // training.sample_batch_size, total // training.samples_per_prompt
    guidance = "no guidance" if config.policy.guidance_scale == 1 else f"guidance {config.policy.guidance_scale:g}"
    sampling = (
        f"sampling   {total:,} samples of {steps} steps an iteration: {_count(batches, 'batch', 'batches')} of "
        f"{training.sample_batch_size}, {_count(groups, 'prompt', 'prompts')} of "
        f"{_count(training.samples_per_prompt, 'sample', 'samples')}"
    )
    whole = (
        f"in all     {_count(config.iterations, 'iteration', 'iterations')}, {config.iterations * total:,} reward "
        f"queries, {config.iterations * training.epochs * training.updates_per_iteration:,} updates at most"
    )
    return [
        *_preset(config),
        f"model      {task.model}, {_count(steps, 'step', 'steps')}, {guidance}",
        *_reward(config),
        *([f"processes  {processes}, which share every batch"] if processes > 1 else []),
        sampling,
        _training(config),
        whole,
        _denoiser(config),
        *([f"memory     {memory}"] if memory else []),
        *([f"time       {estimate}"] if estimate else []),
    ]


def denoiser_rows(config: TrainConfig) -> DenoiserRows:
    """Count the rows of a checked configuration's denoiser calls, as if the model took guidance by a second row."""
    task, training, run = config.task, config.training, config.run
    total, steps = training.samples_per_iteration, task.num_inference_steps
    rows = 1 if config.policy.guidance_scale == 1 else 2
    evaluations = 2 + (config.iterations - 1) // run.eval_interval if run.eval_interval else 2
    slots = min(run.eval_samples, training.sample_batch_size)
    if training.algorithm.startswith("rwr"):  # a denoising loss of each finished sample, without guidance
        trained = training.epochs * _imitated(config)
        measuring = 0
    else:
        trained = rows * training.epochs * total * config.trained_steps
        measuring = rows * total * (config.trained_steps if training.epochs == 1 else steps) * _recomputes(config)
    measuring += trained if training.kl_coef else 0
    return DenoiserRows(
        sampling=config.iterations * rows * total * steps,
        training=config.iterations * trained,
        held_out=evaluations * rows * math.ceil(run.eval_samples / slots) * slots * steps,
        measuring=config.iterations * measuring,
    )


def pairs_per_update(config: TrainConfig) -> int:
    """Return the (sample, timestep) pairs of a checked configuration's update; a sample that is imitated is one."""
    training = config.training
    if training.algorithm == "rwr_sparse":
        return _imitated(config)
    each = 1 if training.algorithm == "rwr" else config.trained_steps
    return training.samples_per_iteration // training.updates_per_iteration * each


def _training(config: TrainConfig) -> str:
    task, training = config.task, config.training
    total, updates = training.samples_per_iteration, training.updates_per_iteration
    said = f"training   {training.algorithm}: {_count(training.epochs, 'epoch', 'epochs')} of "
    said += _count(updates, "update", "updates")
    if training.algorithm.startswith("rwr"):
        chosen = (
            f"the best {100 - training.rwr_percentile:g} %" if training.algorithm == "rwr_sparse" else "all, weighted"
        )
        return (
            f"{said} on the finished samples ({chosen}), in calls of up to "
            f"{_count(min(training.train_batch_size, total), 'sample', 'samples')}"
        )
    trained = config.trained_steps
    return (
        f"{said} of {_count(total // updates, 'sample', 'samples')} × {trained} of {task.num_inference_steps} steps = "
        f"{_count(pairs_per_update(config), 'pair', 'pairs')}, in calls of up to "
        f"{_count(training.train_batch_size, 'pair', 'pairs')}"
    )


def _denoiser(config: TrainConfig) -> str:
    rows = denoiser_rows(config)
    measuring = f", {rows.measuring:,} to compute log-densities again" if rows.measuring else ""
    return (
        f"denoiser   {sum(rows):,} rows: {rows.sampling:,} to sample, {rows.training:,} to train, {rows.held_out:,} "
        f"for held-out pictures{measuring}"
    )


def _preset(config: TrainConfig) -> list[str]:
    """Name the preset, and what was changed in it."""
    if config.run.preset not in PRESETS:
        return []
    given, published = _settings(config), _settings(preset_config(config.run.preset))
    changed = [f"{name}={value}" for name, value in given.items() if value != published[name]]
    return [f"preset     {config.run.preset}{', but ' + ', '.join(changed) if changed else ''}"]


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting but the folder and the device, which are no part of an experiment."""
    groups = config.as_dict().values()
    return {name: value for group in groups for name, value in group.items() if name not in ("run_dir", "device")}


def _reward(config: TrainConfig) -> list[str]:
    """Name the reward with its options, and say whether samples without a score are dropped."""
    said = list(config.task.reward_options)
    if config.training.non_finite_rewards == "drop":
        said.append("samples whose score is NaN or infinite are dropped")
    return [f"reward     {config.task.reward}{': ' + ', '.join(said) if said else ''}"]


def _imitated(config: TrainConfig) -> int:
    """How many samples of an iteration reward-weighted regression trains on, where no two are equally good."""
    total = config.training.samples_per_iteration
    share = config.training.rwr_percentile / 100 if config.training.algorithm == "rwr_sparse" else 0
    return total - math.ceil(share * (total - 1))


def _recomputes(config: TrainConfig) -> bool:
    """Whether log-densities are computed again before the first update: by default in half precision with PPO."""
    if config.training.recompute_log_probs is not None or config.training.algorithm != "ppo":
        return bool(config.training.recompute_log_probs)
    dtype = config.policy.autocast or config.run.dtype
    return dtype in ("float16", "bfloat16") or (dtype == "auto" and resolve_device(config.run.device).type != "cpu")


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
