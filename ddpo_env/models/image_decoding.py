"""From a model's last latents to pixels: the VAE's scaling, its decoder, and rounding, as diffusers does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ddpo_env.models.protocol import DiffusionModel
from ddpo_env.models.quantization import loaded_dtype
from rewards import NonFinite
from rewards.kinds import SampleKind

_WAVEFORM = 128, 384
_LARGEST_SCALE = 1e6
"""Largest valid scale or shift of latents, by its absolute value. Published VAEs have scales between 0.01 and 20."""


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
    in_unit_range = (images.float() / 2 + 0.5).clamp(0, 1)
    return samples_of(torch.where(images.isfinite(), in_unit_range, torch.nan))


def samples_of(images: Tensor) -> Tensor:
    """Turn images or frames `(..., channels, height, width)` in [0, 1] into uint8 `(..., height, width, channels)`.

    Raises:
        NonFiniteSampleError: for NaN or infinite values.
    """
    finite = images.isfinite().flatten(1).all(1)
    pixels = (images.float() * 255).nan_to_num(0).round().to(torch.uint8).movedim(-3, -1).contiguous()
    if finite.device.type != "meta" and not bool(finite.all()):
        raise NonFiniteSampleError(pixels, finite)
    return pixels


def picture_of(samples: Tensor, kind: SampleKind) -> Tensor:
    """Return uint8 images `(batch, height, width, 3)` that show samples.

    Args:
        samples: what a model's `decode` returned.
        kind: of the samples. An image is itself; of a video are its first, middle and last frame, side by side; a
            sound is its waveform, `(batch, 128, 384, 3)`.
    """
    if kind == "video":
        frames = (0, samples.shape[1] // 2, samples.shape[1] - 1)
        return torch.cat([samples[:, frame] for frame in frames], dim=2)
    if kind == "audio":
        height, width = _WAVEFORM
        wave = nn.functional.adaptive_max_pool1d(samples.float().abs().mean(1, keepdim=True), width)
        wave = wave / wave.amax(-1, keepdim=True).clamp(min=1e-6)
        distance = (torch.arange(height, device=wave.device) - (height - 1) / 2).abs() / (height / 2)
        inside = distance[None, :, None] <= wave
        return torch.where(inside[..., None], 40, 255).to(torch.uint8).expand(-1, -1, -1, 3).contiguous()
    return samples


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
        dtype = str(loaded_dtype(model.denoiser)).removeprefix("torch.")
        advice = "" if dtype == "float32" else f"Weights in {dtype} may overflow: try dtype='float32'. "
        raise ValueError(
            f"samples of model {model.source!r} must be finite; its decoder returned NaN or infinite values for prompt "
            f"{prompts[first]!r} (sample {first} of {len(samples)}, {(~finite).sum()} not finite). {advice}"
            "An environment and training can leave such samples out (non_finite_rewards)"
        )
    return samples, finite
