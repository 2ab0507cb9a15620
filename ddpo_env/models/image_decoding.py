"""From a model's last latents to pixels: the VAE's scaling, its decoder, and rounding, as diffusers does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpo_env.models.protocol import DiffusionModel
from rewards import NonFinite

_PIXELS_PER_CALL = 8 * 512 * 512
_LARGEST_SCALE = 1e6
"""Of latents, in size. Published VAEs have scales between 0.01 and 20."""


class NonFiniteSampleError(ValueError):
    """A decoder returned NaN or infinite values.

    Attributes:
        samples: all images of the batch, uint8 `(batch, height, width, channels)`; NaN is black.
        finite: which of them are finite, `(batch,)`.
    """

    def __init__(self, samples: Tensor, finite: Tensor) -> None:
        """Take the rounded images and the flags."""
        super().__init__(
            f"images must be finite; the decoder returned NaN or infinite values for {int((~finite).sum())} of "
            f"{len(finite)}"
        )
        self.samples = samples
        self.finite = finite


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents `(batch, channels, height, width)` to uint8 images `(batch, height, width, 3)`.

    An accelerator decodes a few images at a time, or one at a time if the VAE's tiling is on. A CPU decodes one at a
    time, because there the last bits of a convolution depend on the batch: so an image, and its reward, does not depend
    on the other images of the batch.

    Args:
        vae: an `AutoencoderKL`, whose configuration says how its latents are scaled.
        latents: latents as the denoiser knows them.

    Raises:
        NonFiniteSampleError: if the decoder returns NaN or infinite values.
    """
    pixels = 4 ** (len(vae.config.block_out_channels) - 1) * latents[0, 0].numel()
    one_at_a_time = vae.device.type == "cpu" or getattr(vae, "use_tiling", False)
    rows = 1 if one_at_a_time else max(1, _PIXELS_PER_CALL // pixels)
    scaled = _unscaled(latents.to(vae.device, vae.dtype), vae.config)
    decoded = [_rounded(vae.decode(chunk, return_dict=False)[0]) for chunk in scaled.split(rows)]
    return _finite(*(torch.cat(parts) for parts in zip(*decoded, strict=True)))


def check_scaling(config: Any, source: str) -> None:
    """Refuse a VAE whose configuration cannot scale latents.

    Raises:
        ValueError: naming the entry: `scaling_factor` and `latents_std` must be above 0, and no number is huge.
    """
    for name in ("scaling_factor", "latents_std", "latents_mean", "shift_factor"):
        given = config.get(name)
        is_factor = name in ("scaling_factor", "latents_std")
        if given is None and name != "scaling_factor":
            continue
        for value in given if isinstance(given, list | tuple) else (given,):
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_SCALE
            if not is_number or (is_factor and value <= 0):
                raise ValueError(
                    f"{name} in the configuration of component vae of model {source!r} must be "
                    f"{'above 0' if is_factor else 'finite'} and at most {_LARGEST_SCALE:g}; got {given!r}"
                )


def to_pixels(images: Tensor) -> Tensor:
    """Turn images `(batch, channels, height, width)` in [-1, 1] into uint8 `(batch, height, width, channels)`.

    Raises:
        NonFiniteSampleError: for NaN or infinite values.
    """
    return _finite(*_rounded(images))


def decode_samples(
    model: DiffusionModel, latents: Tensor, prompts: Sequence[str], non_finite: NonFinite
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Decode final latents `(batch, *latent_shape)` with a model, and say which samples are finite.

    Args:
        model: whose `decode` is called.
        latents: finished ones.
        prompts: one per sample, for the message.
        non_finite: `"raise"`, or `"keep"` to return such samples too.

    Returns:
        Samples `(batch, ...)`, and whether each is finite, `(batch,)`. An image that is not has black pixels.

    Raises:
        ValueError: with `"raise"`, for samples with NaN or infinite values, naming the model and the first prompt.
    """
    try:
        samples = model.decode(latents).cpu().numpy()
        finite = np.isfinite(samples).all(axis=tuple(range(1, samples.ndim)))
    except NonFiniteSampleError as error:
        samples, finite = error.samples.cpu().numpy(), error.finite.cpu().numpy()
    if non_finite == "raise" and not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        dtype = str(next(model.denoiser.parameters()).dtype).removeprefix("torch.")
        advice = "" if dtype == "float32" else f"Weights in {dtype} may overflow: try dtype='float32'. "
        raise ValueError(
            f"samples of model {model.source!r} must be finite; its decoder returned NaN or infinite values for prompt "
            f"{prompts[first]!r} (sample {first} of {len(samples)}, {(~finite).sum()} not finite). {advice}"
            "The option non_finite_rewards can leave such samples out"
        )
    return samples, finite


def _rounded(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8 pixels, and which images are finite: a cast would turn NaN into black without a word."""
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).nan_to_num(0).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous(), images.isfinite().flatten(1).all(1)


def _finite(pixels: Tensor, finite: Tensor) -> Tensor:
    if finite.device.type != "meta" and not bool(finite.all()):
        raise NonFiniteSampleError(pixels, finite)
    return pixels


def _unscaled(latents: Tensor, config: Any) -> Tensor:
    """Return the latents that the decoder was trained on."""
    mean, std, shift = (config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if mean is not None and std is not None:
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return latents * std / config.scaling_factor + mean
    latents = latents / config.scaling_factor
    return latents if shift is None else latents + shift
