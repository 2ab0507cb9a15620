"""Which sizes of images a pipeline can have, found by asking it: it prepares latents, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MOST_PIXELS = 2**14
"""A larger side of an image is a mistake, and would fail later for lack of memory."""
_PATCHES = (1, 2, 4, 8)


def check_resolution(
    resolution: Any, source: str, scale: int, most_patches: int | None, accepts: Callable[[int], bool]
) -> None:
    """Refuse a resolution that a pipeline cannot have.

    Args:
        resolution: side of the images in pixels.
        source: of the model, for the message.
        scale: pixels per latent along a side.
        most_patches: how many latents fit along a side, if the denoiser has places for so many only.
        accepts: whether the pipeline prepares latents for a side in pixels that keep its proportions.

    Raises:
        ValueError: naming the resolution, and the multiple that it must be.
    """
    most = _MOST_PIXELS if most_patches is None else min(_MOST_PIXELS, most_patches * scale)
    is_number = isinstance(resolution, int) and not isinstance(resolution, bool)
    if is_number and scale <= resolution <= most and accepts(resolution):
        return
    unit = next((scale * patch for patch in _PATCHES if accepts(scale * patch * _odd(most // (scale * patch)))), None)
    multiple = "a whole number of pixels" if unit is None else f"a multiple of {unit} pixels"
    raise ValueError(
        f"resolution must be {multiple} (at most {most // (unit or 1) * (unit or 1)}) with model {source!r}, whose "
        f"latents are {scale} times smaller than its images; got {resolution!r}"
    )


def _odd(most: int) -> int:
    """Return a small odd number up to `most`: a multiple of it is no multiple of twice the unit."""
    return 5 if most >= 5 else 1
