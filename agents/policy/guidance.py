"""Classifier-free guidance: away from what a negative prompt would give (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpo_env.models.loading import DiffusionModel

Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""Latents, timesteps and conditioning → the denoiser's output."""


def negative_conditioning(model: DiffusionModel) -> dict[str, Tensor]:
    """What guidance leads away from: the model says, or it is the empty prompt."""
    if hasattr(model, "negative_conditioning"):
        return dict(model.negative_conditioning())
    return model.encode_prompts([""])


def guided_output(
    predict: Predict,
    latents: Tensor,
    timestep: Tensor,
    conditioning: dict[str, Tensor],
    negative: dict[str, Tensor],
    scale: float,
    unconditional_gradient: bool = True,
) -> Tensor:
    """Return `u + scale (c - u)`, latent-shaped, of the outputs `c` for the prompts and `u` for the negative one.

    Args:
        predict: calls the denoiser.
        latents: `(batch, ...)`.
        timestep: `(batch,)`.
        conditioning: of the prompts, each `(batch, ...)`.
        negative: each `(1, ...)`.
        scale: 1 is no guidance.
        unconditional_gradient: whether `u` is differentiated. With, both are one call of twice the rows; without, two
            calls, always, so that the batch's shape is the same in sampling and in training.
    """
    leaving = {name: negative[name].to(value).expand_as(value) for name, value in conditioning.items()}
    if unconditional_gradient:
        doubled = {name: torch.cat([leaving[name], value]) for name, value in conditioning.items()}
        unconditional, conditional = predict(torch.cat([latents] * 2), torch.cat([timestep] * 2), doubled).chunk(2)
    else:
        with torch.no_grad():
            unconditional = predict(latents, timestep, leaving)
        conditional = predict(latents, timestep, conditioning)
    return unconditional + scale * (conditional - unconditional)
