"""Steps of flow matching: Euler's, and three ways to add noise to it.

With `x_σ = (1-σ) x_0 + σ ε`, the velocity `v ≈ ε - x_0`, and a step from the flow time `σ` to `σ' = σ - Δ`:

    ode:       mean = x - Δ v,                                                      std = 0
    flow-sde:  mean = x (1 - s²Δ/2σ) - vΔ (1 + s²(1-σ)/2σ),   s = η √(σ/(1-σ)),     std = s √Δ   (arXiv 2505.05470)
    dance:     mean = x - Δ v - ½η²Δ (x - (1-σ) x0_hat)/σ²,                         std = η √Δ   (arXiv 2505.07818)
    cps:       mean = (1-σ') x0_hat + √(σ'²-s²) eps_hat,      s = σ' sin(ηπ/2),     std = s      (arXiv 2509.05952)

where `x0_hat = x - σ v` and `eps_hat = x + (1-σ) v`. With noise level η = 0 each of them is Euler's step. The first two
are discretised SDEs with the marginals of the flow. Coefficients-preserving sampling (CPS) keeps the amount of noise at
every step instead: it replaces a part of the predicted noise, which takes variance from the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ddpo_env.sampler.sampler_rows import SamplerRows, rebuild_scheduler

FlowSampler = Literal["flow-sde", "dance", "cps"]

NOISE_LEVELS: dict[FlowSampler, float] = {"flow-sde": 0.7, "dance": 0.3, "cps": 0.8}
"""The noise level η of each sampler in its authors' code."""
_NEAR_ONE = 1e-4
"""A flow time that is closer to 1 counts as 1."""


def flow_rows(
    config: Any,
    num_inference_steps: int,
    sampler: FlowSampler,
    noise_level: Tensor,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> SamplerRows:
    """Return the steps of a flow.

    Args:
        config: of a `FlowMatchEulerDiscreteScheduler`.
        num_inference_steps: number of steps.
        sampler: how noise is added.
        noise_level: η of each step, `(steps,)` float64.
        sigmas: flow times; default: the scheduler's own.
        mu: shift of the flow times, if the scheduler uses dynamic shifting.

    Raises:
        ValueError: for flow times that the scheduler cannot have, or a noise level that the sampler cannot have.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if config.get("use_dynamic_shifting", False) and mu is None:
        raise ValueError("mu must be given if the scheduler's use_dynamic_shifting is on; got None")
    if sigmas is not None and len(sigmas) != num_inference_steps:
        raise ValueError(f"sigmas must hold num_inference_steps={num_inference_steps} values; got {len(sigmas)}")
    scheduler = rebuild_scheduler(FlowMatchEulerDiscreteScheduler, config)
    options: dict[str, Any] = {} if sigmas is None else {"sigmas": list(sigmas)}
    scheduler.set_timesteps(num_inference_steps, mu=mu, **options)
    schedule = scheduler.sigmas.cpu().double()
    coefficients = {"flow-sde": _flow_sde, "dance": _dance, "cps": _cps}[sampler]
    sample_to_mean, output_to_mean, std = coefficients(schedule, noise_level)
    return SamplerRows(
        timesteps=scheduler.timesteps.cpu(),
        sample_to_x0=torch.ones_like(std),
        output_to_x0=-schedule[:-1],
        sample_to_mean=sample_to_mean,
        output_to_mean=output_to_mean,
        x0_to_mean=torch.zeros_like(std),
        std=std,
        flow_step=-schedule.diff(),
    )


def _flow_sde(schedule: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of latent and velocity in the mean, and the standard deviation, each `(steps,)`."""
    sigma, dt = schedule[:-1], schedule.diff()
    # At sigma = 1 the formula divides by zero, so Flow-GRPO uses the next sigma. diffusers rounds some to just below 1.
    denominator = 1 - torch.where(sigma > 1 - _NEAR_ONE, schedule[1:], sigma)
    squared = noise_level**2 * sigma / denominator
    return (
        1 + squared / (2 * sigma) * dt,
        (1 + squared * (1 - sigma) / (2 * sigma)) * dt,
        (squared * -dt).sqrt(),
    )


def _dance(schedule: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_flow_sde` returns; `x - (1-σ) x0_hat` is `σ x + σ (1-σ) v`."""
    sigma, dt = schedule[:-1], schedule.diff()
    drift = noise_level**2 / (2 * sigma) * dt
    return 1 + drift, dt + drift * (1 - sigma), noise_level * (-dt).sqrt()


def _cps(schedule: Tensor, noise_level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_flow_sde` returns. The last step goes to σ' = 0, where there is no noise."""
    if (noise_level > 1).any():
        raise ValueError(
            "noise_level must be at most 1 with sampler cps, where 1 replaces all of the predicted noise; got "
            f"{noise_level.max().item()}"
        )
    sigma, following = schedule[:-1], schedule[1:]
    angle = noise_level * math.pi / 2
    signal, kept = 1 - following, following * angle.cos()
    return signal + kept, kept * (1 - sigma) - signal * sigma, following * angle.sin()
