"""Steps of variance-preserving diffusion: DDIM (arXiv 2010.02502, eq. 12 and 16) and DDPM (arXiv 2006.11239, eq. 6-7).

With `x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε`, a step goes to the noise level of the timestep before:

    ode:   mean = √ᾱ_prev x0_hat + √(1-ᾱ_prev) eps_hat,       std = 0                            (DDIM with η = 0)
    ddim:  mean = √ᾱ_prev x0_hat + √(1-ᾱ_prev-σ²) eps_hat,    std = σ = η √((1-ᾱ_prev)/(1-ᾱ_t) (1-ᾱ_t/ᾱ_prev))
    ddpm:  the posterior of x_prev given x_t and x0_hat; at the last timestep 0 it has no noise
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddpo_env.sampler.sampler_rows import SamplerRows, rebuild_scheduler


def ddim_rows(config: Any, num_inference_steps: int, eta: Tensor) -> SamplerRows:
    """Return DDIM's steps on the noise schedule of a scheduler's configuration.

    Args:
        config: of the scheduler.
        num_inference_steps: number of steps.
        eta: η of each step, `(steps,)` float64.

    Raises:
        ValueError: if η asks for more noise than the next latent has, or the schedule has no such steps.
    """
    from diffusers import DDIMScheduler

    scheduler = rebuild_scheduler(DDIMScheduler, config)
    timesteps = _timesteps(scheduler, num_inference_steps)
    alphas = scheduler.alphas_cumprod.cpu().double()
    previous = timesteps - config.num_train_timesteps // num_inference_steps
    alpha = alphas[timesteps]
    alpha_previous = torch.where(
        previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod.cpu().double()
    )
    # At a last timestep of 0 both alphas are one, and rounding may give a variance below zero.
    variance = ((1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)).clamp(min=0)
    is_over = eta**2 * variance - (1 - alpha_previous) > 1e-9
    if is_over.any():
        limits = ((1 - alpha_previous) / variance).nan_to_num(nan=math.inf).sqrt()
        raise ValueError(
            f"eta must be at most {limits[is_over].min():.4f} for this schedule and {num_inference_steps} steps, or the"
            f" noise would exceed the noise of the next latent (DDIM eq. 12); got {eta[is_over].max().item()}"
        )
    return _rows(config, timesteps, alpha, alpha_previous, eta**2 * variance, eta * variance.sqrt())


def ddpm_rows(config: Any, num_inference_steps: int, is_deterministic: bool = False) -> SamplerRows:
    """Return DDPM's ancestral steps, or DDIM's with η = 0 at the same timesteps.

    Args:
        config: of the scheduler.
        num_inference_steps: number of steps.
        is_deterministic: whether the steps have no noise.
    """
    from diffusers import DDPMScheduler

    scheduler = rebuild_scheduler(DDPMScheduler, config)
    timesteps = _timesteps(scheduler, num_inference_steps)
    alpha = scheduler.alphas_cumprod.cpu().double()[timesteps]
    alpha_previous = torch.cat([alpha[1:], torch.ones(1, dtype=torch.float64)])
    if is_deterministic:
        none = torch.zeros_like(alpha)
        return _rows(config, timesteps, alpha, alpha_previous, none, none)
    beta = 1 - alpha / alpha_previous
    variance = beta if config.variance_type == "fixed_large" else (1 - alpha_previous) / (1 - alpha) * beta
    sample_to_x0, output_to_x0, _, _ = _predictions(config, timesteps, alpha)
    return SamplerRows(
        timesteps=timesteps,
        sample_to_x0=sample_to_x0,
        output_to_x0=output_to_x0,
        sample_to_mean=(alpha / alpha_previous).sqrt() * (1 - alpha_previous) / (1 - alpha),
        output_to_mean=torch.zeros_like(alpha),
        x0_to_mean=alpha_previous.sqrt() * beta / (1 - alpha),
        std=torch.where(timesteps > 0, variance, 0.0).sqrt(),
        flow_step=_flow_time(alpha) - _flow_time(alpha_previous),
    )


def _rows(
    config: Any, timesteps: Tensor, alpha: Tensor, alpha_previous: Tensor, variance: Tensor, std: Tensor
) -> SamplerRows:
    """Return the steps of DDIM's eq. 12 for variance and standard deviation of the noise, each `(steps,)`."""
    sample_to_x0, output_to_x0, sample_to_noise, output_to_noise = _predictions(config, timesteps, alpha)
    weight = (1 - alpha_previous - variance).clamp(min=0).sqrt()
    return SamplerRows(
        timesteps=timesteps,
        sample_to_x0=sample_to_x0,
        output_to_x0=output_to_x0,
        sample_to_mean=weight * sample_to_noise,
        output_to_mean=weight * output_to_noise,
        x0_to_mean=alpha_previous.sqrt(),
        std=std,
        flow_step=_flow_time(alpha) - _flow_time(alpha_previous),
    )


def _flow_time(alpha: Tensor) -> Tensor:
    """Return √(1-ᾱ) / (√ᾱ + √(1-ᾱ)), `(steps,)`: latents divided by the denominator are a flow's at this time."""
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    return noise / (signal + noise)


def _timesteps(scheduler: Any, num_inference_steps: int) -> Tensor:
    """Return the scheduler's own timesteps, (steps,) int64."""
    scheduler.set_timesteps(num_inference_steps)
    # At some counts, such as 61 of 1000, trailing spacing by np.arange yields a surplus timestep -1.
    timesteps: Tensor = scheduler.timesteps[:num_inference_steps].cpu().long()
    if timesteps.max() >= scheduler.config.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} with steps_offset={scheduler.config.steps_offset} asks for"
            f" timestep {int(timesteps.max())}; the last of {scheduler.config.num_train_timesteps} training timesteps"
            f" is {scheduler.config.num_train_timesteps - 1}: use fewer steps or a smaller steps_offset"
        )
    return timesteps


def _predictions(config: Any, timesteps: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of latent and model output in x0 and in the noise (DDIM eq. 12), each (steps,)."""
    signal, noise, zero, one = alpha.sqrt(), (1 - alpha).sqrt(), torch.zeros_like(alpha), torch.ones_like(alpha)
    if config.prediction_type == "v_prediction":
        return signal, -noise, noise, signal
    if config.prediction_type == "sample":
        return zero, one, 1 / noise, -signal / noise
    if (alpha == 0).any():
        raise ValueError(
            f"prediction_type must be v_prediction or sample if the signal is zero (rescale_betas_zero_snr) at"
            f" timestep {int(timesteps[alpha == 0][0])}; got epsilon"
        )
    return 1 / signal, -noise / signal, zero, one
