"""Checks of speed and memory at growing batch sizes, and what the configured run would take at these rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from agents.commands.doctor.examination import Examination
from agents.commands.doctor.finding import Finding
from agents.planning.flops import describe_seconds
from agents.planning.plan import denoiser_rows, pairs_per_update
from ddpo_env.models.image_decoding import decode_samples

_LONGEST_CALL = 8.0
"""Seconds of a call after which no larger batch is tried."""
_FASTER = 1.25
_FULL = 0.9


@dataclass(frozen=True)
class Rates:
    """Rows a second by batch size; a guided latent is one row here.

    Attributes:
        sampling: without a gradient.
        training: forward and backward.
        out_of_memory: the smallest batch that did not fit, by `sampling` and `training`.
        peak_gb: of the accelerator's memory in training, by batch size; empty on a CPU.
    """

    sampling: dict[int, float]
    training: dict[int, float]
    out_of_memory: dict[str, int]
    peak_gb: dict[int, float]


def check_speed(examination: Examination) -> Finding:
    """Time the denoiser at growing batch sizes, and find batches that do not fit."""
    name, rates, training = "speed and memory", _rates(examination), examination.config.training
    numbers: dict[str, Any] = {
        "samples_per_second_and_step": rates.sampling,
        "trained_pairs_per_second": rates.training,
        "out_of_memory": rates.out_of_memory,
        "peak_gb": rates.peak_gb,
    }
    if rates.out_of_memory:
        settings: dict[str, Any] = {}
        if "training" in rates.out_of_memory:
            settings["train_batch_size"] = max(rates.training, default=1)
        fits = {"sampling": max(rates.sampling, default=0), "training": max(rates.training, default=0)}
        where = " and ".join(
            f"{kind} with batches of {size} (of {fits[kind]} it does)" for kind, size in rates.out_of_memory.items()
        )
        advice = "Take smaller batches (--train-batch-size, --sample-batch-size) or --gradient-checkpointing."
        return Finding(name, "red", numbers, f"The memory does not suffice for {where}.", advice, settings)
    fastest = max(rates.training, key=lambda size: rates.training[size])
    own = max(rates.training)
    meaning = (
        f"{max(rates.sampling.values()):.3g} denoising steps a second at a batch of "
        f"{max(rates.sampling, key=lambda size: rates.sampling[size])}, {rates.training[own]:.3g} trained pairs a "
        f"second at {own}."
    )
    if rates.peak_gb and max(rates.peak_gb.values()) > _FULL * _total_gb(examination):
        advice = "Take a smaller --train-batch-size or --gradient-checkpointing."
        return Finding(name, "amber", numbers, f"{meaning} The memory is nearly full.", advice)
    if rates.training[fastest] > _FASTER * rates.training[own] and training.train_batch_size > fastest:
        meaning += f" Training calls of {fastest} pairs are faster ({rates.training[fastest]:.3g})."
        return Finding(name, "green", numbers, meaning, settings={"train_batch_size": fastest})
    return Finding(name, "green", numbers, meaning)


def check_plan(examination: Examination) -> Finding:
    """Say what the configured run would take at the measured rates."""
    config, rates, samples = examination.config, _rates(examination), examination.samples
    rows = denoiser_rows(config)
    per_latent = 1 if config.policy.guidance_scale == 1 else 2
    sampling, training = max(rates.sampling.values()), rates.training[max(rates.training)]
    denoising = (rows.sampling + rows.held_out + rows.measuring) / per_latent / sampling
    learning = rows.training / per_latent / training
    queries = config.total_iterations * config.samples_per_iteration + rows.held_out / per_latent / len(
        examination.policy.sampler
    )
    decode, score = _seconds_per_sample(examination)
    total = denoising + learning + queries * (decode + score)
    numbers = {
        "hours": round(total / 3600, 4),
        "sampling_hours": round(denoising / 3600, 4),
        "training_hours": round(learning / 3600, 4),
        "decoding_hours": round(queries * decode / 3600, 4),
        "reward_hours": round(queries * score / 3600, 4),
        "reward_queries": round(queries),
        "samples": len(samples.decoded),
    }
    each = describe_seconds(total / config.total_iterations)
    meaning = (
        f"The run of {config.total_iterations} iterations would take about {describe_seconds(total)} ({each} each): "
        f"{denoising / total:.0%} sampling, {learning / total:.0%} training, {queries * score / total:.0%} reward."
    )
    if numbers["reward_hours"] > 0.5 * numbers["hours"] > 0:
        return Finding(
            "plan", "amber", numbers, meaning, "The reward takes most of the time: give it a GPU or batches."
        )
    return Finding("plan", "green", numbers, meaning)


def _seconds_per_sample(examination: Examination) -> tuple[float, float]:
    """Return the seconds of decoding and of scoring a sample."""
    samples = examination.samples
    start = time.perf_counter()
    decode_samples(examination.model, samples.latents, samples.texts, "keep")
    decoded = time.perf_counter()
    examination.score(samples.decoded, samples.prompts)
    return (decoded - start) / len(samples.decoded), (time.perf_counter() - decoded) / len(samples.decoded)


def _rates(examination: Examination) -> Rates:
    return examination.once("measurement of speed", lambda: _measure(examination))


def _measure(examination: Examination) -> Rates:
    policy, config = examination.policy, examination.config
    size = config.training.train_batch_size or examination.algorithm.micro_batch_size or 1
    pairs = min(size, pairs_per_update(config))
    out_of_memory: dict[str, int] = {}
    peaks: dict[int, float] = {}

    def sample(rows: int) -> None:
        with torch.no_grad():
            policy.evaluate_actions(*_zeros(examination, rows))

    def train(rows: int) -> None:
        if policy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(policy.device)
        policy.evaluate_actions(*_zeros(examination, rows))[1].mean().backward()
        policy.optimizer.zero_grad()
        if policy.device.type == "cuda":
            peaks[rows] = torch.cuda.max_memory_allocated(policy.device) / 2**30

    policy.set_training_mode(True)
    sampling = _growing(sample, config.training.sample_batch_size, policy.device, "sampling", out_of_memory)
    training = _growing(train, pairs, policy.device, "training", out_of_memory)
    return Rates(sampling, training, out_of_memory, peaks)


def _growing(
    call: Callable[[int], None], most: int, device: torch.device, kind: str, out_of_memory: dict[str, int]
) -> dict[int, float]:
    """Return rows a second by batch size: powers of 4 and `most`, as long as they fit and do not take long."""
    rates: dict[int, float] = {}
    # The first call of one row prepares kernels, and the next one is timed.
    sizes = [1, *(4**power for power in range(most.bit_length()) if 2 * 4**power < most), most]
    while sizes:
        size = sizes.pop(0)
        try:
            seconds = _seconds(call, size, device)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            out_of_memory[kind] = size
            torch.cuda.empty_cache()  # without effect elsewhere
            sizes = [size // 2] if size // 2 > max(rates, default=0) else []
            continue
        rates[size] = size / seconds
        if seconds > _LONGEST_CALL or kind in out_of_memory:
            break
    return rates


def _seconds(call: Callable[[int], None], size: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call(size)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _zeros(examination: Examination, rows: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return an observation and actions of a batch."""
    policy, model = examination.policy, examination.model
    shapes = {"latents": model.latent_shape, **model.conditioning_shapes}
    observation = {name: torch.zeros(rows, *shape, device=policy.device) for name, shape in shapes.items()}
    timestep = policy.sampler.timesteps[:1].to(policy.device, torch.float32).expand(rows)
    return observation | {"timestep": timestep}, torch.zeros(rows, *model.latent_shape, device=policy.device)


def _total_gb(examination: Examination) -> float:
    return float(torch.cuda.mem_get_info(examination.policy.device)[1] / 2**30)
