"""The one form of an image's size in settings: `512` for a square, `"832x1216"` for width x height, both in pixels."""

from __future__ import annotations

import re
from typing import TypeAlias

from ddpo_env.validation.options import shown

Resolution: TypeAlias = int | str
"""Side of a square, or `"<width>x<height>"`, in pixels."""

MOST_PIXELS = 2**14
"""A larger side of an image is a mistake, and would fail later for lack of memory."""
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


def height_and_width(resolution: Resolution) -> tuple[int, int]:
    """Return height and width in pixels.

    Raises:
        ValueError: for a value of another form, or a side that is no image's.
    """
    sides: tuple[int, ...] = ()
    if isinstance(resolution, str) and (match := _SIZE.fullmatch(resolution)):
        sides = int(match[2]), int(match[1])
    elif isinstance(resolution, int) and not isinstance(resolution, bool):
        sides = resolution, resolution
    if not sides or not all(1 <= side <= MOST_PIXELS for side in sides):
        raise ValueError(
            "resolution must be None, a number of pixels such as 512, or width x height such as '832x1216', with sides "
            f"from 1 to {MOST_PIXELS}; got {shown(resolution)}"
        )
    return sides[0], sides[1]


def plain_resolution(resolution: Resolution | None) -> Resolution | None:
    """Return the one form of a size that compares equal with itself: a square is a number, also if `"512x512"` came.

    Raises:
        ValueError: as `height_and_width`.
    """
    if resolution is None:
        return None
    height, width = height_and_width(resolution)
    return height if height == width else f"{width}x{height}"
