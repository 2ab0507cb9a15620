"""Which sizes of images a pipeline can have, found by asking it: it prepares latents, or refuses."""

from __future__ import annotations

from collections.abc import Callable

from ddpo_env.validation.resolution import MOST_PIXELS, Resolution, height_and_width

_PATCHES = (1, 2, 4, 8)


def check_resolution(
    resolution: Resolution, source: str, scale: int, most_patches: int | None, accepts: Callable[[int, int], bool]
) -> None:
    """Refuse a resolution that a pipeline cannot have.

    Args:
        resolution: of the images, see `ddpo_env.validation.resolution`.
        source: of the model, for the message.
        scale: pixels per latent along a side.
        most_patches: how many latents fit along a side, if the denoiser has places for so many only.
        accepts: whether the pipeline prepares latents for a height and a width in pixels that keep its proportions.

    Raises:
        ValueError: naming the resolution, and the multiple that its sides must be.
    """
    most = MOST_PIXELS if most_patches is None else min(MOST_PIXELS, most_patches * scale)
    height, width = height_and_width(resolution)
    if all(scale <= side <= most for side in (height, width)) and accepts(height, width):
        return

    def takes(unit: int) -> bool:
        side = unit * (5 if most // unit >= 5 else 1)  # odd: a multiple of it is no multiple of twice the unit
        return accepts(side, side)

    unit = next((scale * patch for patch in _PATCHES if takes(scale * patch)), None)
    multiple = "a whole number of pixels" if unit is None else f"a multiple of {unit} pixels"
    largest = most // (unit or 1) * (unit or 1)
    both = "" if height == width else " along both sides"
    raise ValueError(
        f"resolution must be {multiple}{both} (at most {largest}) with model {source!r}, whose latents are {scale} "
        f"times smaller than its images; got {resolution!r}"
    )
