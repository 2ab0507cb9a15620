"""What a caller may give to `DiffusionPolicy`; every function raises a `ValueError` that names the argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from gymnasium import spaces

from ddpo_env.models.loading import DiffusionModel, load_model
from ddpo_env.spaces import DenoisingObservationSpace


def check_arguments(
    use_sde: bool, num_inference_steps: int | None, guidance_scale: float, log_prob_reduction: str, autocast: str | None
) -> None:
    """Refuse what needs no model to be refused."""
    if use_sde:
        raise ValueError("use_sde must be False: the sampler's own noise is the exploration; got True")
    if num_inference_steps is not None and num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}")
    if not np.isfinite(guidance_scale) or guidance_scale < 0:
        raise ValueError(f"guidance_scale must be at least 0 (1 is off); got {guidance_scale}")
    if log_prob_reduction not in ("mean", "sum"):
        raise ValueError(f"log_prob_reduction must be mean or sum; got {log_prob_reduction!r}")
    if autocast not in (None, "bfloat16", "float16"):
        raise ValueError(f"autocast must be None, bfloat16 or float16; got {autocast!r}")


def check_model(
    model: DiffusionModel, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], guidance_scale: float
) -> None:
    """Refuse spaces that are not the model's, and guidance where there is nothing to guide by."""
    if guidance_scale != 1 and not model.conditioning_shapes:
        raise ValueError(
            f"guidance_scale must be 1 with model {model.source!r}, which has no conditioning to guide by; "
            f"got {guidance_scale}"
        )
    expected = {"latents": model.latent_shape, "timestep": (1,), **model.conditioning_shapes}
    found = {name: tuple(space.shape or ()) for name, space in getattr(observation_space, "spaces", {}).items()}
    if found != expected or action_space.shape != model.latent_shape:
        raise ValueError(
            f"observation_space must be that of model {model.source!r}, {expected}; got {found} "
            f"with action shape {action_space.shape}"
        )


def find_model(
    observation_space: spaces.Space[Any],
    model: str | Path | DiffusionPipeline | None,
    num_inference_steps: int | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    resolution: int | None,
) -> tuple[DiffusionModel, int]:
    """Return the model, and the length of an episode; what is not given, the observation space knows."""
    if isinstance(observation_space, DenoisingObservationSpace):
        model = observation_space.model if model is None else model
        device = observation_space.device if device is None else device
        dtype = observation_space.dtype if dtype is None else dtype  # type: ignore[assignment]
        resolution = observation_space.resolution if resolution is None else resolution
        num_inference_steps = num_inference_steps or observation_space.num_inference_steps
    if model is None or num_inference_steps is None:
        raise ValueError(
            "model and num_inference_steps must be given in policy_kwargs, because observation_space does not name "
            f"them: it is a {type(observation_space).__name__}, not a DenoisingObservationSpace"
        )
    loaded = load_model(model, "auto" if device is None else device, "auto" if dtype is None else dtype, resolution)
    return loaded, num_inference_steps
