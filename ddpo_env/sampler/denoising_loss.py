"""What a denoiser is pretrained on: clean latents with noise added, and what it must say of them.

The likelihood-based baselines train on it (Black et al. 2023, section 4.2; DDPM, arXiv 2006.11239, eq. 14).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rewards.devices import copied_to


def draw_timesteps(scheduler: Any, batch: int, device: torch.device | str) -> Tensor:
    """Return timesteps uniform over the scheduler's training range, `(batch,)` int64, from torch's generator."""
    return torch.randint(0, scheduler.config.num_train_timesteps, (batch,), device=device)


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Noise clean latents, and tell what the denoiser must answer.

    Args:
        scheduler: the model's diffusers scheduler; only its `config` is read.
        latents: clean, `(batch, ...)`.
        noise: standard normal, of the same shape.
        timestep: `(batch,)`, on the training scale.

    Returns:
        The noisy latents, and the target: noise, velocity or clean latent, as `prediction_type` says; for flow matching
        `noise - latents`. Both `(batch, ...)` float32.
    """
    latents, noise = latents.float(), noise.float()
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = (timestep / config.num_train_timesteps).view(-1, *[1] * (latents.ndim - 1))
        return (1 - sigma) * latents + sigma * noise, noise - latents
    process = _forward_process(config)
    process.alphas_cumprod = copied_to(process.alphas_cumprod, latents.device)
    noisy = process.add_noise(latents, noise, timestep)
    if config.prediction_type == "epsilon":
        return noisy, noise
    if config.prediction_type == "sample":
        return noisy, latents
    return noisy, process.get_velocity(latents, noise, timestep)


def _forward_process(config: Any) -> DDPMScheduler:
    """The noise schedule alone, in the class that has both the noise and the velocity."""
    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    return DDPMScheduler(**{name: config[name] for name in names if name in config})
