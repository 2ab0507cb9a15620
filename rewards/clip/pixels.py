"""CLIP's preprocessing on tensors, so that a score has a gradient with respect to the pixels.

It does what the image processor does with Pillow, but never rounds to 256 levels. Bicubic resizing with `antialias` is
Pillow's filter (a = -1/2). `docs/rewards.md` says how far the scores of the two are apart.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate, pad

_MODES = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that `interpolate` has."""


def preprocess(images: Tensor, processor: Any) -> Tensor:
    """Return what an image processor of CLIP makes of images, with a gradient.

    Args:
        images: (batch, 3, height, width) in [0, 1].
        processor: A `CLIPImageProcessor`, whose settings are followed.

    Raises:
        ValueError: The settings ask for something else than resizing, a crop of the middle, and normalisation.
    """
    if processor.do_resize:
        images = resize(images, _size_after(images, processor.size), _mode_of(processor))
    if processor.do_center_crop:
        height, width = processor.crop_size.height, processor.crop_size.width
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        if min(top, left) < 0:
            raise ValueError(f"images must be at least {height} x {width} for the crop; got {tuple(images.shape)}")
        images = images[:, :, top : top + height, left : left + width]
    if processor.do_rescale:
        images = images * (255 * processor.rescale_factor)
    if processor.do_normalize:
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
        images = (images - mean) / std
    return images


def resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize images, (batch, 3, height, width) in [0, 1], as Pillow does."""
    if tuple(images.shape[2:]) == size:
        return images
    return interpolate(images, size, mode=mode, antialias=True).clamp(0, 1)


def letterbox(images: Tensor, side: int) -> Tensor:
    """Resize the longest side of images to `side` pixels, and centre them on a black square."""
    scale = side / max(images.shape[2:])
    height, width = (max(round(length * scale), 1) for length in images.shape[2:])
    top, left = (side - height) // 2, (side - width) // 2
    return pad(resize(images, (height, width)), (left, side - width - left, top, side - height - top))


def _size_after(images: Tensor, size: Any) -> tuple[int, int]:
    height, width = images.shape[2:]
    if size.shortest_edge and not size.longest_edge:
        short, long = min(height, width), max(height, width)
        longest = int(size.shortest_edge * long / short)
        return (longest, size.shortest_edge) if width <= height else (size.shortest_edge, longest)
    if size.height and size.width:
        return size.height, size.width
    raise ValueError(f"size of the image processor must be a shortest edge, or height and width; got {size}")


def _mode_of(processor: Any) -> str:
    if processor.resample not in _MODES:
        raise ValueError(
            f"resample of the image processor must be {' or '.join(_MODES.values())} for a gradient; got "
            f"{processor.resample!r}"
        )
    return _MODES[processor.resample]
