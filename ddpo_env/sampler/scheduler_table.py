"""Which sampler a diffusers scheduler stands for, and its steps in float64, from the scheduler's configuration.

`gaussian_sampler` turns them into a distribution over the next latent. `diffusion_steps` and `flow_steps` have the
formulas.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, cast

import torch

from ddpo_env.sampler.diffusion_steps import ddim_rows, ddpm_rows
from ddpo_env.sampler.flow_steps import NOISE_LEVELS, FlowSampler, flow_rows
from ddpo_env.sampler.sampler_rows import Noise, SamplerRows, noise_by_step, rebuild_scheduler
from ddpo_env.validation.choices import SMALLEST_STD, SamplerName

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
_DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
_REPLACED_BY_DDIM = (
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
_DDIM_FAMILY = (*_DDIM, *_REPLACED_BY_DDIM)
_DDPM_FAMILY = ("DDPMScheduler", "DDPMParallelScheduler")
_FLOW_FAMILY = ("FlowMatchEulerDiscreteScheduler",)


def read_scheduler(
    scheduler: Any,
    num_inference_steps: int,
    eta: Noise,
    *,
    sampler: SamplerName | None,
    noise_level: Noise | None,
    min_std: float | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> tuple[SamplerRows, float | None]:
    """Return the float64 table of a scheduler's sampler, and the bound on the predicted clean latent, if any.

    The arguments and errors are those of `GaussianSampler.from_scheduler`.
    """
    family = type(scheduler).__name__
    _check_scheduler(scheduler, family)
    _check_steps(scheduler, num_inference_steps)
    name = sampler_of(scheduler, sampler)
    is_flow = family in _FLOW_FAMILY
    for argument, value in (("noise_level", noise_level), ("sigmas", sigmas), ("mu", mu)):
        if value is not None and not is_flow:
            raise ValueError(f"{argument} applies to {', '.join(_FLOW_FAMILY)} only, not to {family}; leave it out")
    _check_noise(family, name, eta, noise_level, min_std)
    config, steps = scheduler.config, num_inference_steps
    if name == "ode":
        noise = torch.zeros(steps, dtype=torch.float64)
    elif is_flow:
        level = NOISE_LEVELS[cast(FlowSampler, name)] if noise_level is None else noise_level
        noise = noise_by_step("noise_level", level, steps)
    else:
        noise = noise_by_step("eta", eta, steps)
    if is_flow:
        rows = flow_rows(config, steps, "flow-sde" if name == "ode" else cast(FlowSampler, name), noise, sigmas, mu)
    elif family in _DDPM_FAMILY:
        rows = ddpm_rows(config, steps, is_deterministic=name == "ode")
    else:
        rows = ddim_rows(ddim_of(scheduler).config, steps, noise)
    rows = rows.with_least_std(min_std, noise)
    clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", False) else None
    return rows if clip is not None else rows.with_x0_folded(), clip


def samplers_of(scheduler: Any) -> tuple[SamplerName, ...]:
    """Return the samplers that a scheduler can stand for, the default one first."""
    family = type(scheduler).__name__
    if family in _FLOW_FAMILY:
        return (*NOISE_LEVELS, "ode")
    return ("ddpm", "ode") if family in _DDPM_FAMILY else ("ddim", "ode")


def sampler_of(scheduler: Any, sampler: SamplerName | None) -> SamplerName:
    """Return the sampler that is asked for, or the default one.

    Raises:
        ValueError: for one that the scheduler cannot stand for.
    """
    valid = samplers_of(scheduler)
    if sampler is not None and sampler not in valid:
        raise ValueError(
            f"sampler must be one of {', '.join(valid)} for a model with {type(scheduler).__name__}; got {sampler!r}"
        )
    return sampler or valid[0]


def ddim_of(scheduler: Any) -> Any:
    """Return DDIM on the noise schedule of a scheduler; it clips only if that one does, unlike diffusers' default.

    A step of diffusers' DDIM ends `num_train_timesteps // num_inference_steps` timesteps lower. With `linspace` spacing
    the next step begins elsewhere, so that few steps lose a part of the signal. DDIM in the place of another scheduler
    has `trailing` spacing then, which begins at the same timestep and has no such gaps (arXiv 2305.08891, table 2).
    """
    from diffusers import DDIMScheduler

    config = {"clip_sample": False, **scheduler.config}
    if type(scheduler).__name__ in _REPLACED_BY_DDIM and config.get("timestep_spacing") == "linspace":
        config["timestep_spacing"] = "trailing"
    return rebuild_scheduler(DDIMScheduler, config)


def _check_scheduler(scheduler: Any, family: str) -> None:
    supported = (*_DDIM_FAMILY, *_DDPM_FAMILY, *_FLOW_FAMILY)
    if family not in supported or not hasattr(scheduler, "config"):
        raise ValueError(f"scheduler must be one of {', '.join(supported)}; got {family}")
    config = scheduler.config
    if config.get("thresholding", False):
        raise ValueError(f"thresholding must be False: it makes a step of {family} not Gaussian; got True")
    if config.get("invert_sigmas", False):
        raise ValueError("invert_sigmas must be False: the flow time must run from noise to data; got True")
    if config.get("stochastic_sampling", False):
        raise ValueError("stochastic_sampling must be False: the policy's sampler and noise_level add noise; got True")
    if family in _FLOW_FAMILY:
        return
    if config.prediction_type not in _PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(_PREDICTION_TYPES)}; got {config.prediction_type}")
    if family in _DDPM_FAMILY and config.variance_type not in _FIXED_VARIANCES:
        raise ValueError(f"variance_type must be one of {', '.join(_FIXED_VARIANCES)}; got {config.variance_type}")


def _check_steps(scheduler: Any, num_inference_steps: int) -> None:
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


def _check_noise(family: str, name: SamplerName, eta: Noise, noise_level: Noise | None, min_std: float | None) -> None:
    """Refuse a setting of the noise that a sampler does not have."""
    if name == "ode":
        for argument, value, default in (
            ("eta", eta, 1.0),
            ("noise_level", noise_level, None),
            ("min_std", min_std, None),
        ):
            if value != default:
                raise ValueError(f"{argument} must be left out with sampler ode, which has no noise; got {value}")
    if name != "ddim" and eta != 1:
        noise = "DDPM is eta = 1" if name == "ddpm" else "noise_level sets the noise"
        raise ValueError(f"eta must be 1 with {family} ({noise}; DDIMScheduler has a free eta); got {eta}")
    if min_std is not None and not (math.isfinite(min_std) and min_std >= SMALLEST_STD):
        raise ValueError(f"min_std must be at least {SMALLEST_STD}; got {min_std}")
