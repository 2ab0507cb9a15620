"""What a configuration amounts to, in words and numbers, before anything starts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from agents.config.presets import PRESETS, preset_config
from agents.config.train_config import TrainConfig
from ddpo_env.models.families.encoded_prompts import size_of_prompt_images
from ddpo_env.models.prompt_images import have_images, takes_image
from ddpo_env.prompts import PROMPT_SETS, load_prompts
from ddpo_env.prompts.images import IMAGE
from rewards.networks.devices import resolve_device, resolve_dtype


class DenoiserRows(NamedTuple):
    """Rows that the denoiser computes in a whole run; a guided call has two rows per latent.

    Attributes:
        sampling: to generate the samples that are trained on.
        training: forward and backward, in the updates.
        held_out: to generate the held-out images.
        measuring: without gradients, to compute log-probabilities again in half precision, and outputs of the
            pretrained policy for a KL penalty, or of an older policy that an algorithm compares with.
    """

    sampling: int
    training: int
    held_out: int
    measuring: int


def describe_plan(
    config: TrainConfig, processes: int = 1, estimate: str | None = None, weights: str | None = None
) -> list[str]:
    """Return the plan of a resolved configuration, one line per subject; sizes are in samples.

    Args:
        config: resolved.
        processes: number of processes that share the run.
        estimate: how long it will take, in words.
        weights: how much memory the weights take, in words.
    """
    training, total, steps = config.training, config.samples_per_iteration, config.num_inference_steps
    batches, groups = total // training.sample_batch_size, total // training.samples_per_prompt
    guidance = "no guidance" if config.policy.guidance_scale == 1 else f"guidance {config.policy.guidance_scale:g}"
    updates = config.total_iterations * training.epochs * training.updates_per_iteration
    return [
        *_preset(config),
        f"model      {config.model}, {_count(steps, 'step', 'steps')}, {guidance}",
        *_loras(config),
        *_images(config),
        *_reward(config),
        *_holdout(config),
        *([f"processes  {processes}, which share every batch"] if processes > 1 else []),
        f"sampling   {total:,} samples of {steps} steps per iteration: {_count(batches, 'batch', 'batches')} of "
        f"{training.sample_batch_size}, {_count(groups, 'prompt', 'prompts')} with "
        f"{_count(training.samples_per_prompt, 'sample', 'samples')} each",
        *_noise(config),
        _training(config),
        f"total      {_count(config.total_iterations, 'iteration', 'iterations')}, "
        f"{config.total_iterations * total:,} reward queries, at most {_count(updates, 'update', 'updates')}",
        _denoiser(config),
        *([f"weights    {weights}"] if weights else []),
        *([f"time       {estimate}"] if estimate else []),
    ]


def denoiser_rows(config: TrainConfig) -> DenoiserRows:
    """Count the rows of a resolved configuration's denoiser calls, as if guidance always took a second row."""
    training, run = config.training, config.run
    total, steps = config.samples_per_iteration, config.num_inference_steps
    rows = 1 if config.policy.guidance_scale == 1 else 2
    evaluations = 2 + (config.total_iterations - 1) // run.eval_interval if run.eval_interval else 2
    batch = config.eval_batch_size
    traits, measuring = config.traits, 0
    trained = rows * training.epochs * config.trained_samples * _trained_calls(config)
    if traits.trains_on_steps:
        scored = config.update.noise_window or int(config.policy.stochastic_steps(steps).sum())
        measuring = rows * total * (config.trained_steps if training.epochs == 1 else scored) * _recomputes(config)
    needs_reference = config.update.kl_coef > 0 or "pretrained" in traits.compares_with
    measuring += (trained if needs_reference else 0) + _older_policies(config, trained)
    return DenoiserRows(
        sampling=rows * _sampled_rows(config),
        training=config.total_iterations * trained,
        held_out=evaluations * rows * math.ceil(run.eval_samples / batch) * batch * steps,
        measuring=config.total_iterations * measuring,
    )


def _sampled_rows(config: TrainConfig) -> int:
    """Count the rows that generate a run's samples, without guidance: what samples of a prompt share counts once."""
    training, total, steps = config.training, config.samples_per_iteration, config.num_inference_steps
    if not training.shared_noise:
        return config.total_iterations * total * steps
    stochastic, rows = config.policy.stochastic_steps(steps), 0
    for iteration in range(config.total_iterations):
        start, _ = config.update.noise_window_at(iteration, steps) or (0, steps)
        shared = 1 + start + int(stochastic[start:].argmax())  # the first step with noise branches after its call
        rows += total // training.samples_per_prompt * shared + total * (steps - shared)
    return rows


def pairs_per_update(config: TrainConfig) -> int:
    """Return the (sample, timestep) pairs in one update of a resolved configuration, or its samples."""
    each = config.trained_steps if config.traits.trains_on_steps else 1
    return math.ceil(config.trained_samples * each / config.training.updates_per_iteration)


def _training(config: TrainConfig) -> str:
    training, total, traits = config.training, config.samples_per_iteration, config.traits
    updates = training.updates_per_iteration
    text = f"training   {config.algorithm}: {_count(training.epochs, 'epoch', 'epochs')} of "
    text += _count(updates, "update", "updates")
    if traits.differentiates_reward:
        last = "step" if training.draft_steps == 1 else f"{training.draft_steps} steps"
        size = min(training.train_batch_size, total // updates)
        return f"{text} through the reward, the decoder and the last {last}, {_call(config, size, 'sample')}"
    if not traits.trains_on_steps:
        chosen = f"the best {100 - training.rwr_percentile:g} %" if traits.samples == "best" else "all, weighted"
        size = min(training.train_batch_size, total)
        return f"{text} on the finished samples ({chosen}), {_call(config, size, 'sample')}"
    has_pairs = traits.samples == "pairs"  # of samples, not of a sample and a timestep
    unit, two = ("row", ", two for a pair of samples at a timestep") if has_pairs else ("pair", "")
    return (
        f"{text} with {_count(config.trained_samples // updates, 'sample', 'samples')} × {config.trained_steps} of "
        f"{config.num_inference_steps} steps = {_count(pairs_per_update(config), unit, unit + 's')}{two}, "
        f"{_call(config, training.train_batch_size, unit)}"
    )


def _noise(config: TrainConfig) -> list[str]:
    """Say which steps have noise, and whether samples of a prompt start from the same one."""
    update = config.update
    notes: list[str] = []
    if config.policy.sampler is not None:
        notes.append(config.policy.sampler)
    if update.noise_window is not None:
        steps, every = config.num_inference_steps, update.noise_window_iterations
        places = {update.noise_window_at(iteration, steps) for iteration in range(0, config.total_iterations, every)}
        moves = f"which move on by {update.noise_window_stride} every {_count(every, 'iteration', 'iterations')}"
        stay = "the same ones in the whole run"
        notes.append(f"in {update.noise_window} of {steps} steps, {moves if len(places) > 1 else stay}")
    if config.training.shared_noise:
        notes.append("samples of a prompt start from the same noise")
    return [f"noise      {', '.join(notes)}"] if notes else []


def _call(config: TrainConfig, size: int, unit: str) -> str:
    if config.training.train_batch_size == 0:
        return f"in calls of as many {unit}s as fit into the memory"
    return f"in calls of up to {_count(size, unit, unit + 's')}"


def _denoiser(config: TrainConfig) -> str:
    rows = denoiser_rows(config)
    what = "to compute log-probabilities again" if _recomputes(config) else "of policies to compare with"
    measuring = f", {rows.measuring:,} {what}" if rows.measuring else ""
    return (
        f"denoiser   {sum(rows):,} rows: {rows.sampling:,} to sample, {rows.training:,} to train, {rows.held_out:,} "
        f"for held-out images{measuring}"
    )


def _preset(config: TrainConfig) -> list[str]:
    """Name the preset, and the settings that differ from it."""
    if config.preset not in PRESETS:
        return []
    given, published = _settings(config), _settings(preset_config(config.preset).resolved())
    changed = [f"{name}={value}" for name, value in given.items() if value != published[name]]
    return [f"preset     {config.preset}{', but ' + ', '.join(changed) if changed else ''}"]


def _loras(config: TrainConfig) -> list[str]:
    """Name the LoRA that is merged into the model, and the one that is trained further."""
    base, lora = config.run.base_lora, config.policy.lora
    parts = [*([f"{base} is merged"] if base else []), *([f"{lora} is trained further"] if lora else [])]
    return [f"LoRA       {', '.join(parts)}"] if parts else []


def _images(config: TrainConfig) -> list[str]:
    """Say who gets the images of the prompts, if they have some."""
    if config.prompts in PROMPT_SETS or not have_images(load_prompts(config.prompts)):
        return []
    size = size_of_prompt_images(config.run.size[1].get(IMAGE))
    if size is not None:
        return [f"images     one for each prompt, for the pipeline and the reward: {size[0]}x{size[1]} pixels"]
    if takes_image(config.model, download=False) is None:
        return ["images     one for each prompt, for the reward, and for the pipeline if its call takes an image"]
    return ["images     one for each prompt, for the reward only: the pipeline's call takes no image"]


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return every setting by name, without the folder and the device, which do not define an experiment."""
    flat: dict[str, Any] = {}
    for name, value in config.as_dict().items():
        flat |= value if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name not in ("run_dir", "device")}


def _reward(config: TrainConfig) -> list[str]:
    """Name the reward with its options, and say whether samples without a score are dropped."""
    notes = list(config.reward_options)
    if config.training.non_finite_rewards == "drop":
        notes.append("samples whose score is NaN or infinite are dropped")
    return [f"reward     {config.reward}{': ' + ', '.join(notes) if notes else ''}"]


def _holdout(config: TrainConfig) -> list[str]:
    """Name the held-out reward with its options, and say whether it may end the run."""
    settings = config.run
    if settings.holdout_reward is None:
        return []
    notes = [*settings.holdout_reward_options]
    if settings.stop_at_overoptimisation:
        notes.append("the run ends when it falls behind the reward")
    return [f"held-out   {settings.holdout_reward}{': ' + ', '.join(notes) if notes else ''}"]


def _trained_calls(config: TrainConfig) -> int:
    """Return how many calls of the denoiser an epoch differentiates for a sample that is trained on."""
    if config.traits.differentiates_reward:
        return config.training.draft_steps
    return config.trained_steps if config.traits.trains_on_steps else 1


def _older_policies(config: TrainConfig, trained: int) -> int:
    """Return the rows of an iteration that are computed with older policies too, out of those that are trained on."""
    traits, updates = config.traits, config.training.epochs * config.training.updates_per_iteration
    later = trained * (updates - 1) // updates
    compares_later = "sampling" in traits.compares_with or config.training.trust_region != "clip"
    return later * compares_later + trained * ("lagging" in traits.compares_with)


def _recomputes(config: TrainConfig) -> bool:
    """Return whether log-probabilities are computed again before the first update: with a ratio in half precision."""
    recompute = config.update.recompute_log_probs
    if recompute is not None or not config.traits.has_ratio:
        return bool(recompute)
    dtype = resolve_dtype(config.policy.autocast or config.run.dtype, resolve_device(config.device))
    return dtype != torch.float32


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
