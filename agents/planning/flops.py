"""The cost of a run before it starts: floating-point operations of its networks, and the time that they take.

torch counts the operations on the meta device, where nothing is computed. The device's rate is that of a matrix
product, measured in a moment, times the fraction of it that a denoiser reaches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agents.config.train_config import TrainConfig
from agents.planning.plan import denoiser_rows
from agents.policy.lora import add_lora
from agents.policy.options import LoraTargets
from ddpo_env.models import DiffusionModel, abilities_of
from ddpo_env.models.outline import outline_model
from rewards.networks.devices import resolve_device, resolve_dtype

EFFICIENCY: dict[str, float] = {"cpu": 0.9, "cuda": 0.2, "mps": 0.2}
"""Fraction of the rate of matrix products that denoisers reach. The CPU's is measured (docs/scaling.md). The GPU's
follows from the published 144 s per iteration on eight A100s; it makes estimates too long rather than too short."""

_MATRIX_SIDE: dict[str, int] = {"cpu": 1024}
_REPEATS = 5
_LONG = 5e-3
"""Seconds of a small product after which no larger one is measured."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per sample or row; a multiplication and an addition are two.

    Attributes:
        forward: the denoiser on one latent, without a gradient.
        training: the same, with the gradient of the weights that learn.
        decoding: the decoder, for one image; 0 if it uses no torch network.
    """

    forward: float
    training: float
    decoding: float


def count_flops(model: DiffusionModel, lora_rank: int, lora_targets: LoraTargets = "attention") -> Flops:
    """Count the operations of a model on the meta device, see `ddpo_env.models.outline`."""
    with torch.device("meta"):
        learning: nn.Module = (
            add_lora(model.denoiser, lora_rank, lora_targets) if lora_rank else model.denoiser.requires_grad_()
        )
    latents = torch.zeros(1, *model.latent_shape, device="meta")
    timestep = torch.zeros(1, device="meta")
    conditioning = {name: torch.zeros(1, *shape, device="meta") for name, shape in model.conditioning_shapes.items()}
    if abilities_of(model).guidance_embeds:
        conditioning["guidance"] = torch.zeros(1)

    def forward() -> Tensor:
        return model.predict(learning, latents, timestep, conditioning)

    with torch.no_grad():
        sampling = _count(forward)
    training = _count(lambda: forward().float().sum().backward())
    return Flops(sampling, training, _count(lambda: model.decode(latents)))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure a device's floating-point operations per second in a matrix product; takes a tenth of a second.

    Where a small product takes long, as in float16 on most CPUs, it is the one that counts: the others take seconds.
    """
    side = _MATRIX_SIDE.get(device.type, 8192)
    for tried in (side // 4, side):
        left, right = (torch.ones(tried, tried, device=device, dtype=dtype) for _ in range(2))
        seconds = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            (left @ right)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        if min(seconds) > _LONG:
            break
    return 2 * tried**3 / min(seconds)


def estimate_time(config: TrainConfig, processes: int = 1) -> str:
    """Describe about how long a resolved configuration takes on this machine, without loading the model.

    Args:
        config: resolved.
        processes: number of processes that share the work.
    """
    model = outline_model(config.model, *config.run.size)
    if model is None:
        return f"not known before {config.model} is loaded"
    policy, iterations = config.policy, config.total_iterations
    try:
        flops = count_flops(model, policy.lora_rank, policy.lora_targets)
    except RuntimeError as error:  # it reads values, such as those of a mask, which the meta device does not have
        return f"not known, because the calls of {config.model} depend on values ({error})"
    rows = denoiser_rows(config)
    sampling = rows.sampling * flops.forward + iterations * config.samples_per_iteration * flops.decoding
    training = rows.training * flops.training + rows.measuring * flops.forward
    total = sampling + training + rows.held_out * flops.forward
    device = resolve_device(config.device)
    rate = processes * matmul_rate(device, resolve_dtype(policy.autocast or config.run.dtype, device))
    usable = rate * EFFICIENCY[device.type]
    return (
        f"about {describe_seconds(total / usable)} plus the reward's, "
        f"{describe_seconds((sampling + training) / iterations / usable)} per iteration: "
        f"{describe_flops(sampling / iterations)} of sampling and {describe_flops(training / iterations)} of training "
        f"at {EFFICIENCY[device.type]:.0%} of {describe_flops(rate)}/s, the rate of matrix products"
    )


def describe_seconds(seconds: float) -> str:
    """Return a time in a suitable unit, with two digits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def describe_flops(operations: float) -> str:
    """Return a number of floating-point operations in a suitable unit, with two digits."""
    for size, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if operations >= size:
            return f"{_two_digits(operations / size)} {unit}"
    return f"{_two_digits(operations / 1e9)} GFLOP"


def _two_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def _count(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
