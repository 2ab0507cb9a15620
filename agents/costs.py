"""What a run costs before it starts: floating-point operations of its networks, and the time they take on a device.

Operations are counted by torch on the meta device, where no number is computed; the rate at which the device does them
is that of a matrix product, measured in a moment, times the share of it that a denoiser reaches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agents.configuration import TrainConfig
from agents.lora import add_lora
from ddpo_env.models import DiffusionModel
from ddpo_env.outline import outline_model
from rewards.devices import resolve_device, resolve_dtype

EFFICIENCY: dict[str, float] = {"cpu": 0.9, "cuda": 0.2, "mps": 0.2}
"""Share of the rate of matrix products that denoisers reach: measured on a CPU (docs/scaling.md); for a GPU what the
published 144 s an iteration on eight A100s amount to, so that it says too much rather than too little."""

_MATRIX: dict[str, int] = {"cpu": 1024}
_REPEATS = 5


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one picture or row, a multiplication and an addition being two.

    Attributes:
        forward: of the denoiser called on one latent, without a gradient.
        training: the same with the gradient of what learns.
        decoding: of the decoder, for one picture; 0 if it does not run on torch's networks.
    """

    forward: float
    training: float
    decoding: float


@dataclass(frozen=True)
class IterationWork:
    """Floating-point operations of an iteration, and of one evaluation on held-out seeds."""

    sampling: float
    training: float
    evaluation: float


def denoiser_rows(config: TrainConfig) -> tuple[int, int]:
    """Return how many latents the denoiser is called on in an iteration: in sampling, and in training.

    Guidance doubles both; reward-weighted regression trains without guidance, on the finished latents.
    """
    task, training = config.task, config.training
    guided = 1 if config.policy.guidance_scale == 1 else 2
    sampling = training.samples_per_iteration * task.num_inference_steps * guided
    if training.algorithm.startswith("rwr"):
        share = 1 - training.rwr_percentile / 100 if training.algorithm == "rwr_sparse" else 1.0
        return sampling, training.epochs * math.ceil(share * training.samples_per_iteration)
    return sampling, training.epochs * training.samples_per_iteration * config.trained_steps * guided


def count_work(model: DiffusionModel, lora_rank: int, lora_targets: Any = "attention") -> Work:
    """Count the operations of a model on the meta device, see `ddpo_env.outline`."""
    if lora_rank:
        learning: nn.Module = add_lora(model.denoiser, lora_rank, lora_targets)
    else:
        learning = model.denoiser.requires_grad_()
    latents = torch.zeros(1, *model.latent_shape, device="meta")
    timestep = torch.zeros(1, device="meta")
    conditioning = {name: torch.zeros(1, *shape, device="meta") for name, shape in model.conditioning_shapes.items()}
    if getattr(model, "guidance_embeds", False):
        conditioning["guidance"] = torch.zeros(1, device="meta")

    def forward() -> Tensor:
        return model.predict(learning, latents, timestep, conditioning)

    with torch.no_grad():
        alone = _operations(forward)
    both = _operations(lambda: forward().float().sum().backward())
    return Work(alone, both, _operations(lambda: model.decode(latents)))


def iteration_work(config: TrainConfig, work: Work) -> IterationWork:
    """Return the operations of an iteration and of an evaluation."""
    sampled, trained = denoiser_rows(config)
    samples = config.training.samples_per_iteration
    sampling = sampled * work.forward + samples * work.decoding
    return IterationWork(sampling, trained * work.training, sampling * config.run.eval_samples / samples)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure a device's floating-point operations per second in a matrix product; takes a tenth of a second."""
    side = _MATRIX.get(device.type, 8192)
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def estimate_time(config: TrainConfig, processes: int = 1) -> str:
    """Say about how long a checked configuration takes on this machine, without loading the model.

    Where processes share a CPU, each has its own threads, and its rate is measured while the others measure theirs.

    Args:
        config: as resolved.
        processes: that share the work.
    """
    model = outline_model(config.task.model)
    if model is None:
        return f"not known before {config.task.model} is downloaded"
    policy = config.policy
    work = iteration_work(config, count_work(model, policy.lora_rank, policy.lora_targets))
    device = resolve_device(config.run.device)
    rate = matmul_rate(device, resolve_dtype(policy.autocast or config.run.dtype, device))
    usable = rate * EFFICIENCY[device.type] * processes
    iteration = (work.sampling + work.training) / usable
    evaluations = 2 + (config.iterations - 1) // config.run.eval_interval if config.run.eval_interval else 2
    whole = config.iterations * iteration + evaluations * work.evaluation / usable
    return (
        f"about {describe_seconds(whole)} and the reward's, {describe_seconds(iteration)} an iteration: "
        f"{describe_operations(work.sampling)} of sampling and {describe_operations(work.training)} of training at "
        f"{EFFICIENCY[device.type]:.0%} of {describe_operations(rate * processes)}/s, the rate of matrix products"
    )


def describe_seconds(seconds: float) -> str:
    """Return a time in the unit that suits it, with two digits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def describe_operations(operations: float) -> str:
    """Return a number of floating-point operations in the unit that suits it, with two digits."""
    for size, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if operations >= size:
            return f"{_two_digits(operations / size)} {unit}"
    return f"{_two_digits(operations / 1e9)} GFLOP"


def _two_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def _operations(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
