"""What a run costs before it starts: floating-point operations of its networks, and the time they take on a device.

Operations are counted by torch on the meta device, where no number is computed; the rate at which the device does them
is that of a matrix product, measured in a moment, times the share of it that a denoiser reaches.
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
from ddpo_env.models.loading import DiffusionModel
from ddpo_env.models.outline import outline_model
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


def count_work(model: DiffusionModel, lora_rank: int, lora_targets: Any = "attention") -> Work:
    """Count the operations of a model on the meta device, see `ddpo_env.models.outline`."""
    with torch.device("meta"):
        learning: nn.Module = (
            add_lora(model.denoiser, lora_rank, lora_targets) if lora_rank else model.denoiser.requires_grad_()
        )
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

    Args:
        config: as resolved.
        processes: that share the work.
    """
    model = outline_model(config.task.model, config.task.resolution)
    if model is None:
        return f"not known before {config.task.model} is downloaded"
    policy = config.policy
    work, rows = count_work(model, policy.lora_rank, policy.lora_targets), denoiser_rows(config)
    sampling = rows.sampling * work.forward + config.iterations * config.training.samples_per_iteration * work.decoding
    training = rows.training * work.training + rows.measuring * work.forward
    whole = sampling + training + rows.held_out * work.forward
    device = resolve_device(config.run.device)
    rate = processes * matmul_rate(device, resolve_dtype(policy.autocast or config.run.dtype, device))
    usable = rate * EFFICIENCY[device.type]
    iteration = (sampling + training) / config.iterations
    return (
        f"about {describe_seconds(whole / usable)} and the reward's, {describe_seconds(iteration / usable)} "
        f"an iteration: {describe_operations(sampling / config.iterations)} of sampling and "
        f"{describe_operations(training / config.iterations)} of training at {EFFICIENCY[device.type]:.0%} of "
        f"{describe_operations(rate)}/s, the rate of matrix products"
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
