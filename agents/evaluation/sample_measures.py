"""Measures of samples that need no model: how different samples of one prompt are, and how much of a grid they show."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from rewards.kinds import kind_of

_MOST_BLOCKS = 32


def prompt_diversity(samples: npt.NDArray[Any], prompts: Sequence[str]) -> float | None:
    """Return how far apart two samples of the same prompt are: their root mean square difference.

    Images and videos are compared in blocks of pixels, at most 32 by 32 of them, so that grain does not count. 0 is
    black and 1 is white, so 0 means that all samples of a prompt are the same, and 1 is the largest difference. Other
    samples are compared as they are, in their own unit. The mean is over the pairs of each prompt, then over prompts.

    Args:
        samples: `(samples, ...)`.
        prompts: one per sample.

    Returns:
        The mean; `None` if no prompt has two samples.
    """
    is_picture = kind_of(samples) in ("image", "video")
    rows = torch.stack([_compared_values(sample, is_picture) for sample in samples])
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[prompt].append(index)
    pairs = [torch.pdist(rows[members]) for members in groups.values() if len(members) > 1]
    if not pairs:
        return None
    return float(torch.stack([distances.mean() for distances in pairs]).mean()) / math.sqrt(rows.shape[1])


def grid_period(sample_shape: Sequence[int], latent_shape: Sequence[int]) -> int | None:
    """Return the pixels between two places of the latent grid, on which decoders and transformers leave their pattern.

    The places are those of latents `(channels, height, width)`, or the tokens of packed latents `(tokens, channels)`.
    With Stable Diffusion this is the VAE's factor, 8; with FLUX it is the side of a token, 16.

    Args:
        sample_shape: of one sample.
        latent_shape: of its latent.

    Returns:
        The period; `None` for samples that are no images, and where an image has one pixel per place or no square grid.
    """
    if len(sample_shape) != 3 or sample_shape[-1] != 3 or len(latent_shape) not in (2, 3):
        return None
    height, width = sample_shape[:2]
    places = math.prod(latent_shape[1:]) if len(latent_shape) == 3 else latent_shape[0]
    period = math.isqrt(height * width // places)
    fits = period > 1 and height % period == 0 == width % period and places * period**2 == height * width
    return period if fits else None


def grid_energy(images: npt.NDArray[np.uint8], period: int) -> float:
    """Return the fraction of the images' spectral energy at the frequencies of a grid and their harmonics.

    The energy is that of the brightness (the mean of the channels) without its mean. The frequencies are those whose
    horizontal and vertical parts are both multiples of `1 / period` per pixel. By Parseval's theorem this is the
    variance of the mean tile over the variance of the image, where the mean tile is the average of all tiles of
    `period` by `period` pixels. White noise gives about `period² / (height · width)`, a pattern that repeats in every
    tile gives 1. The fraction is over all images together, so that flat images count little.

    Args:
        images: `(samples, height, width, 3)` uint8.
        period: in pixels; it divides height and width.

    Returns:
        The fraction, 0 to 1; 0 for images without any contrast.
    """
    between = total = 0.0
    for image in images:  # one at a time: a batch of large images in float64 would need much memory
        brightness = image.mean(axis=-1, dtype=np.float64)
        height, width = brightness.shape
        tiles = brightness.reshape(height // period, period, width // period, period).mean(axis=(0, 2))
        between += tiles.var()
        total += brightness.var()
    return float(between / total) if total > 0 else 0.0


def _compared_values(sample: npt.NDArray[Any], is_picture: bool) -> Tensor:
    """Return a picture as the means of at most 32 by 32 blocks, 0 to 1, and another sample as it is; flat, float32."""
    values = torch.as_tensor(sample, dtype=torch.float32)
    if not is_picture:
        return values.flatten()
    planes = values.movedim(-1, -3) / 255
    height, width = planes.shape[-2:]
    blocks = min(_MOST_BLOCKS, height), min(_MOST_BLOCKS, width)
    return functional.adaptive_avg_pool2d(planes, blocks).flatten()
