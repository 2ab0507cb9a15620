"""A small value network over the state `(x_t, t, c)`, for algorithms that want a critic.

DDPO has none: with one terminal reward and statistics per prompt a critic helps little. Stable-Baselines3's GAE uses
one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.nn import functional

_POOLED_SIDE = 8
_POOLED_FRAMES = 4
_TIMESTEP_CHANNELS = 64


class DenoisingCritic(nn.Module):
    """An MLP on the pooled latent, the sinusoidal timestep embedding and the averaged conditioning."""

    def __init__(
        self, latent_shape: tuple[int, ...], conditioning_shapes: Mapping[str, tuple[int, ...]], hidden: int = 256
    ):
        """Size the MLP for the model's shapes; `hidden` is the width of its two hidden layers."""
        super().__init__()
        self.timestep_embedding = Timesteps(_TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        latents = self._pool(torch.zeros(1, *latent_shape)).shape[1]
        inputs = latents + _TIMESTEP_CHANNELS + sum(shape[-1] for shape in conditioning_shapes.values())
        self.value = nn.Sequential(
            nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Return values `(batch, 1)` for latents `(batch, ...)` and timesteps `(batch,)`."""
        context = [tensor.reshape(len(tensor), -1, tensor.shape[-1]).mean(1) for tensor in conditioning.values()]
        return self.value(torch.cat([self._pool(latents), self.timestep_embedding(timestep), *context], dim=1).float())

    @staticmethod
    def _pool(latents: Tensor) -> Tensor:
        """Return the latents flattened, `(batch, inputs)`, with at most 256 places averaged from all of them."""
        if latents.ndim == 3:  # packed tokens (tokens, channels) or a sound (channels, times): the longer axis
            axis = 1 if latents.shape[1] > latents.shape[2] else 2
            by_place = latents.movedim(axis, 2)
            places = min(by_place.shape[2], _POOLED_SIDE**2)
            latents = functional.adaptive_avg_pool1d(by_place, places).movedim(2, axis)
        elif latents.ndim == 4 and latents.shape[-1] > _POOLED_SIDE:
            latents = functional.adaptive_avg_pool2d(latents, _POOLED_SIDE)
        elif latents.ndim == 5:  # a video (channels, frames, height, width)
            frames, height, width = latents.shape[2:]
            sizes = min(frames, _POOLED_FRAMES), min(height, _POOLED_SIDE), min(width, _POOLED_SIDE)
            latents = functional.adaptive_avg_pool3d(latents, sizes)
        return latents.flatten(1)
