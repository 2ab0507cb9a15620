"""From a model's last latents to pixels: the VAE's scaling, its decoder, and rounding, as diffusers does it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_PIXELS_PER_CALL = 8 * 512 * 512


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents `(batch, channels, height, width)` to uint8 images `(batch, height, width, 3)`.

    An accelerator decodes a few images at a time, or one at a time if the VAE's tiling is on. A CPU decodes one at a
    time, because there the last bits of a convolution depend on the batch: so an image, and its reward, does not depend
    on the other images of the batch.

    Args:
        vae: an `AutoencoderKL`, whose configuration says how its latents are scaled.
        latents: latents as the denoiser knows them.
    """
    pixels = 4 ** (len(vae.config.block_out_channels) - 1) * latents[0, 0].numel()
    one_at_a_time = vae.device.type == "cpu" or getattr(vae, "use_tiling", False)
    rows = 1 if one_at_a_time else max(1, _PIXELS_PER_CALL // pixels)
    scaled = _unscaled(latents.to(vae.device, vae.dtype), vae.config)
    return torch.cat([to_pixels(vae.decode(chunk, return_dict=False)[0]) for chunk in scaled.split(rows)])


def check_scaling(config: Any, source: str) -> None:
    """Refuse a VAE whose configuration cannot scale latents.

    Raises:
        ValueError: naming the entry: `scaling_factor` and `latents_std` must be above 0, the shifts finite.
    """
    for name in ("scaling_factor", "latents_std", "latents_mean", "shift_factor"):
        given = config.get(name)
        is_factor = name in ("scaling_factor", "latents_std")
        if given is None and name != "scaling_factor":
            continue
        for value in given if isinstance(given, list | tuple) else (given,):
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or (is_factor and value <= 0):
                raise ValueError(
                    f"{name} in the configuration of component vae of model {source!r} must be "
                    f"{'above 0' if is_factor else 'finite'}; got {given!r}"
                )


def to_pixels(images: Tensor) -> Tensor:
    """Turn images `(batch, channels, height, width)` in [-1, 1] into uint8 `(batch, height, width, channels)`."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def _unscaled(latents: Tensor, config: Any) -> Tensor:
    """Return the latents that the decoder was trained on."""
    mean, std, shift = (config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if mean is not None and std is not None:
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return latents * std / config.scaling_factor + mean
    latents = latents / config.scaling_factor
    return latents if shift is None else latents + shift
