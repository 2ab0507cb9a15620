"""Classifier-free guidance: away from the output for a negative prompt (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpo_env.models import DiffusionModel, abilities_of

Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""Latents, timesteps and conditioning → the denoiser's output."""


def guided_output(
    predict: Predict,
    latents: Tensor,
    timestep: Tensor,
    conditioning: dict[str, Tensor],
    negative: dict[str, Tensor],
    guide: Callable[[Tensor, Tensor], Tensor],
    unconditional_gradient: bool = True,
) -> Tensor:
    """Return the guided output, latent-shaped, of the outputs `c` for the prompts and `u` for the negative prompt.

    Args:
        predict: calls the denoiser.
        latents: `(batch, ...)`.
        timestep: `(batch,)`.
        conditioning: conditioning of the prompts, each tensor `(batch, ...)`.
        negative: conditioning of the negative prompt, each tensor `(1, ...)`; what is not in it, such as an encoded
            image, is that of the prompts.
        guide: combines `u` and `c`, see `ModelAbilities.guide`.
        unconditional_gradient: whether `u` is differentiated. If so, both outputs come from one call with twice the
            rows. If not, there are always two calls, so that sampling and training have the same batch shape.
    """
    unconditioned = {
        name: negative[name].to(value).expand_as(value) if name in negative else value
        for name, value in conditioning.items()
    }
    if unconditional_gradient:
        doubled = {name: torch.cat([unconditioned[name], value]) for name, value in conditioning.items()}
        unconditional, conditional = predict(torch.cat([latents] * 2), torch.cat([timestep] * 2), doubled).chunk(2)
    else:
        with torch.no_grad():
            unconditional = predict(latents, timestep, unconditioned)
        conditional = predict(latents, timestep, conditioning)
    return guide(unconditional, conditional)


def can_be_guided(model: DiffusionModel) -> bool:
    """Return whether a model takes a prompt and its pipeline guides as `ModelAbilities.guide` does."""
    return bool(model.conditioning_shapes) and abilities_of(model).guidance_problem is None


def check_guidance(model: DiffusionModel, guidance_scale: float) -> None:
    """Refuse guidance for a model without conditioning, or whose pipeline has a guidance of another form."""
    if guidance_scale != 1 and not model.conditioning_shapes:
        raise ValueError(
            f"guidance_scale must be 1 with model {model.source!r}, which has no conditioning for guidance; "
            f"got {guidance_scale}"
        )
    problem = abilities_of(model).guidance_problem
    if guidance_scale != 1 and problem is not None:
        raise ValueError(f"guidance_scale must be 1 with model {model.source!r}; {problem}; got {guidance_scale}")
