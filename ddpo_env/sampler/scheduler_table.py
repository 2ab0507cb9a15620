"""The coefficients of a sampler's steps, computed in float64 from the configuration of a diffusers scheduler.

`gaussian_sampler` turns them into a distribution over the next latent. Sources: DDIM (arXiv 2010.02502, eq. 12 and 16),
DDPM (arXiv 2006.11239, eq. 6-7), Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALLEST_STD = 1e-5
"""Below this standard deviation, float32 rounding of the latent itself dominates the density."""

DEFAULT_NOISE_LEVEL = 0.7
"""Flow-GRPO's noise level (arXiv 2505.05470)."""

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
_DDIM_FAMILY = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
_DDPM_FAMILY = ("DDPMScheduler", "DDPMParallelScheduler")
_FLOW_FAMILY = ("FlowMatchEulerDiscreteScheduler",)


class SamplerRows(NamedTuple):
    """The table in float64, before it is checked."""

    timesteps: Tensor
    sample_to_x0: Tensor
    output_to_x0: Tensor
    sample_to_mean: Tensor
    output_to_mean: Tensor
    x0_to_mean: Tensor
    std: Tensor

    def with_x0_folded(self) -> SamplerRows:
        """Return the same sampler with the predicted clean latent written in terms of latent and output."""
        return self._replace(
            sample_to_mean=self.sample_to_mean + self.x0_to_mean * self.sample_to_x0,
            output_to_mean=self.output_to_mean + self.x0_to_mean * self.output_to_x0,
            x0_to_mean=torch.zeros_like(self.x0_to_mean),
        )


def read_scheduler(
    scheduler: Any,
    num_inference_steps: int,
    eta: float,
    *,
    noise_level: float | None,
    min_std: float | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> tuple[SamplerRows, float | None]:
    """Return the float64 table of a scheduler's sampler, and the bound on the predicted clean latent, if any.

    The arguments and errors are those of `GaussianSampler.from_scheduler`.
    """
    name = type(scheduler).__name__
    _check_scheduler(scheduler, name)
    _check_arguments(scheduler, num_inference_steps, eta, min_std)
    is_flow = name in _FLOW_FAMILY
    for argument, value in (("noise_level", noise_level), ("sigmas", sigmas), ("mu", mu)):
        if value is not None and not is_flow:
            raise ValueError(f"{argument} applies to {', '.join(_FLOW_FAMILY)} only, not to {name}; leave it out")
    if (is_flow or name in _DDPM_FAMILY) and eta != 1:
        noise = "noise_level sets the noise" if is_flow else "DDPM is eta = 1"
        raise ValueError(f"eta must be 1 with {name} ({noise}; DDIMScheduler has a free eta); got {eta}")
    if is_flow:
        noise_level = DEFAULT_NOISE_LEVEL if noise_level is None else noise_level
        rows = _flow_rows(scheduler.config, num_inference_steps, noise_level, sigmas, mu)
    elif name in _DDPM_FAMILY:
        rows = _ddpm_rows(scheduler.config, num_inference_steps)
    else:
        rows = _ddim_rows(scheduler.config, num_inference_steps, eta)
    rows = rows._replace(std=_floored_std(rows, min_std, name))
    clip = float(scheduler.config.get("clip_sample_range", 1.0)) if scheduler.config.get("clip_sample", False) else None
    if clip is None:
        rows = rows.with_x0_folded()
    return rows, clip


def resolution_shift(scheduler: Any, image_tokens: int) -> float:
    """Return the shift `mu` of the flow times for images with so many tokens: larger images need more noise.

    Linear between the two sizes that the scheduler's configuration names, as in diffusers' `calculate_shift`.
    """
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (image_tokens - config.base_image_seq_len))


def _check_scheduler(scheduler: Any, name: str) -> None:
    supported = (*_DDIM_FAMILY, *_DDPM_FAMILY, *_FLOW_FAMILY)
    if name not in supported or not hasattr(scheduler, "config"):
        raise ValueError(f"scheduler must be one of {', '.join(supported)}; got {name}")
    config = scheduler.config
    if config.get("thresholding", False):
        raise ValueError(f"thresholding must be False: it makes a step of {name} not Gaussian; got True")
    if config.get("invert_sigmas", False):
        raise ValueError("invert_sigmas must be False: the flow time must run from noise to data; got True")
    if name in _FLOW_FAMILY:
        return
    if config.prediction_type not in _PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(_PREDICTION_TYPES)}; got {config.prediction_type}")
    if name in _DDPM_FAMILY and config.variance_type not in _FIXED_VARIANCES:
        raise ValueError(f"variance_type must be one of {', '.join(_FIXED_VARIANCES)}; got {config.variance_type}")


def _check_arguments(scheduler: Any, num_inference_steps: int, eta: float, min_std: float | None) -> None:
    limit = scheduler.config.num_train_timesteps
    if type(scheduler).__name__ in _FLOW_FAMILY:  # whose times are no integers: some count from 0 to 1
        limit = max(limit, 1000)
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, numbers.Integral):
        raise TypeError(f"num_inference_steps must be an integer; got {num_inference_steps!r}")
    if not 1 <= num_inference_steps <= limit:
        raise ValueError(
            f"num_inference_steps must be between 1 and {limit} (the scheduler's num_train_timesteps);"
            f" got {num_inference_steps}"
        )
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"eta must be above 0 (at 0 the sampler is deterministic and has no density); got {eta}")
    if min_std is not None and not (math.isfinite(min_std) and min_std >= SMALLEST_STD):
        raise ValueError(f"min_std must be at least {SMALLEST_STD}; got {min_std}")


def ddim_of(scheduler: Any) -> Any:
    """Return DDIM on the noise schedule of a scheduler; it clips only if that one does, unlike diffusers' default."""
    from diffusers import DDIMScheduler

    return rebuild_scheduler(DDIMScheduler, {"clip_sample": False, **scheduler.config})


def rebuild_scheduler(scheduler_class: Any, config: Any) -> Any:
    """Return a scheduler of the class with all values of the configuration (`from_config` would drop defaults)."""
    parameters = inspect.signature(scheduler_class.__init__).parameters
    return scheduler_class(**{name: config[name] for name in parameters if name in config})


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


def _ddim_rows(config: Any, num_inference_steps: int, eta: float) -> SamplerRows:
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
    direction = 1 - alpha_previous - eta**2 * variance
    if (direction < -1e-9).any():
        largest = ((1 - alpha_previous) / variance).nan_to_num(nan=math.inf).min().sqrt()
        raise ValueError(
            f"eta must be at most {largest:.4f} for this schedule and {num_inference_steps} steps, or the noise would"
            f" exceed the noise of the next latent (DDIM eq. 12); got {eta}"
        )
    sample_to_x0, output_to_x0, sample_to_noise, output_to_noise = _predictions(config, timesteps, alpha)
    weight = direction.clamp(min=0).sqrt()
    return SamplerRows(
        timesteps=timesteps,
        sample_to_x0=sample_to_x0,
        output_to_x0=output_to_x0,
        sample_to_mean=weight * sample_to_noise,
        output_to_mean=weight * output_to_noise,
        x0_to_mean=alpha_previous.sqrt(),
        std=eta * variance.sqrt(),
    )


def _ddpm_rows(config: Any, num_inference_steps: int) -> SamplerRows:
    from diffusers import DDPMScheduler

    scheduler = rebuild_scheduler(DDPMScheduler, config)
    timesteps = _timesteps(scheduler, num_inference_steps)
    alpha = scheduler.alphas_cumprod.cpu().double()[timesteps]
    alpha_previous = torch.cat([alpha[1:], torch.ones(1, dtype=torch.float64)])
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
    )


def _flow_rows(
    config: Any, num_inference_steps: int, noise_level: float, sigmas: Sequence[float] | None, mu: float | None
) -> SamplerRows:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not (math.isfinite(noise_level) and noise_level > 0):
        raise ValueError(f"noise_level must be above 0 (at 0 the flow is deterministic); got {noise_level}")
    if config.get("use_dynamic_shifting", False) and mu is None:
        raise ValueError("mu must be given if the scheduler's use_dynamic_shifting is on; got None")
    if sigmas is not None and len(sigmas) != num_inference_steps:
        raise ValueError(f"sigmas must hold num_inference_steps={num_inference_steps} values; got {len(sigmas)}")
    scheduler = rebuild_scheduler(FlowMatchEulerDiscreteScheduler, config)
    options: dict[str, Any] = {} if sigmas is None else {"sigmas": list(sigmas)}
    scheduler.set_timesteps(num_inference_steps, mu=mu, **options)
    schedule = scheduler.sigmas.cpu().double()
    sigma, dt = schedule[:-1], schedule.diff()
    # At sigma = 1 the formula divides by zero, so Flow-GRPO uses the next sigma.
    denominator = 1 - torch.where(sigma >= 1, schedule[1:], sigma)
    squared = noise_level**2 * sigma / denominator
    return SamplerRows(
        timesteps=scheduler.timesteps.cpu(),
        sample_to_x0=torch.ones_like(sigma),
        output_to_x0=-sigma,
        sample_to_mean=1 + squared / (2 * sigma) * dt,
        output_to_mean=(1 + squared * (1 - sigma) / (2 * sigma)) * dt,
        x0_to_mean=torch.zeros_like(sigma),
        std=(squared * -dt).sqrt(),
    )


def _floored_std(rows: SamplerRows, min_std: float | None, name: str) -> Tensor:
    if min_std is not None:
        return rows.std.clamp(min=min_std)
    deterministic = (rows.std < SMALLEST_STD).nonzero().flatten().tolist()
    if deterministic:
        where = ", ".join(f"{index} (timestep {rows.timesteps[index].item():g})" for index in deterministic[:4])
        remedy = "set set_alpha_to_one=False and steps_offset=1 in a DDIM configuration"
        raise ValueError(
            f"std must be at least {SMALLEST_STD} at every step, or the step has no density; with {name} and these"
            f" arguments it is less at step {where} of {len(rows.std)}. Pass min_std (0.02 is what Stable Diffusion"
            f" 1.x ends with), or {'raise noise_level' if name in _FLOW_FAMILY else remedy}"
        )
    return rows.std
