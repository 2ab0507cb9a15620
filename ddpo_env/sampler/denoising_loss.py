"""The pretraining task of a denoiser: noise is added to clean latents, and the denoiser predicts a target.

The likelihood-based baselines train on it (Black et al. 2023, section 4.2; DDPM, arXiv 2006.11239, eq. 14).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ddpo_env.sampler.sampler_rows import rebuild_scheduler
from rewards.devices import copied_to


def draw_timesteps(
    scheduler: Any, batch: int, device: torch.device | str, generator: torch.Generator | None = None
) -> Tensor:
    """Return timesteps uniform over the scheduler's training range, `(batch,)` int64, from torch's generator or one."""
    return torch.randint(0, scheduler.config.num_train_timesteps, (batch,), device=device, generator=generator)


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Add noise to clean latents, and return the target of the denoiser.

    Args:
        scheduler: the model's diffusers scheduler; only its `config` is read.
        latents: clean latents, `(batch, ...)`.
        noise: standard normal noise of the same shape.
        timestep: `(batch,)`, on the training scale.

    Returns:
        The noisy latents, and the target: noise, velocity or clean latents, as `prediction_type` says; for flow
        matching `noise - latents`. Both are `(batch, ...)` float32.
    """
    latents, noise = latents.float(), noise.float()
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = (timestep / config.num_train_timesteps).view(-1, *[1] * (latents.ndim - 1))
        return (1 - sigma) * latents + sigma * noise, noise - latents
    process = rebuild_scheduler(DDPMScheduler, config)  # this class has both the noise and the velocity
    process.alphas_cumprod = copied_to(process.alphas_cumprod, latents.device)
    noisy = process.add_noise(latents, noise, timestep)
    if config.prediction_type == "epsilon":
        return noisy, noise
    if config.prediction_type == "sample":
        return noisy, latents
    return noisy, process.get_velocity(latents, noise, timestep)
