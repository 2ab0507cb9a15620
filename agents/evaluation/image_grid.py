"""Grids of images with captions, images in a row, and films."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from agents.output.files import write_file

_MARGIN = 6
_FONT_SIZE = 12
_LINE = 15
_LABEL_WIDTH = 84
_SMALLEST_TILE = 112
_MOST_LINES = 6
"""A longer text is cut, because a grid is for looking at images. The files have the whole text."""
_FRAME_MS, _LAST_FRAME_MS = 150, 2000
"""How long a frame of a film is shown."""
_COLOURS = 128
"""Colours in a frame of a film: half of what a GIF can have. It looks the same, and the file is a sixth smaller."""


def image_grid(
    rows: Sequence[npt.NDArray[np.uint8]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Return a grid of images in labelled rows; small images are enlarged without smoothing, long texts are cut.

    Args:
        rows: for each row, images `(columns, height, width, 3)` uint8; a row may have fewer than the first one.
        row_labels: one per row, at the left; a line break starts a new line.
        column_labels: one per column, above it.
        captions: for each row, a text beneath each image; empty for none at all.
    """
    height, width = rows[0].shape[1:3]
    scale = max(1, -(-_SMALLEST_TILE // width))
    tile = (width * scale, height * scale)
    font = ImageFont.load_default(size=_FONT_SIZE)
    characters = max(8, tile[0] // 7)
    headings = [_wrapped(label, characters) for label in column_labels]
    beneath = [
        [[line for part in text.split("\n") for line in _wrapped(part, characters)] for text in row] for row in captions
    ] or [[] for _ in rows]
    heights = [tile[1] + _MARGIN + _LINE * max((len(lines) for lines in row), default=0) for row in beneath]
    left = _LABEL_WIDTH if any(row_labels) else _MARGIN
    top = _MARGIN + _LINE * max((len(heading) for heading in headings), default=0)
    sheet = Image.new("RGB", (left + len(rows[0]) * (tile[0] + _MARGIN), top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        x = left + column * (tile[0] + _MARGIN) + tile[0] // 2
        draw.multiline_text((x, top - 3), "\n".join(heading), "black", font, anchor="md", align="center")
    for index, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + sum(heights[:index])
        draw.multiline_text((_MARGIN, y + tile[1] // 2), label, "black", font, anchor="lm")
        for column, image in enumerate(images):
            x = left + column * (tile[0] + _MARGIN)
            sheet.paste(Image.fromarray(image).resize(tile, Image.Resampling.NEAREST), (x, y))
            if captions:
                place, text = (x + tile[0] // 2, y + tile[1] + 1), "\n".join(beneath[index][column])
                draw.multiline_text(place, text, "black", font, anchor="ma", align="center")
    return sheet


def _wrapped(text: str, characters: int) -> list[str]:
    return textwrap.wrap(text, characters, max_lines=_MOST_LINES, placeholder=" …")


def write_strip(path: Path, images: npt.NDArray[np.uint8]) -> None:
    """Write images `(count, height, width, 3)` uint8 side by side, unchanged, to a PNG file."""
    write_image(path, Image.fromarray(np.concatenate(images, axis=1)))


def write_image(path: Path, image: Image.Image) -> None:
    """Write an image to a PNG file, completely or not at all."""
    content = io.BytesIO()
    image.save(content, "png")
    write_file(path, content.getvalue())


def write_film(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write frames to an animated GIF that repeats, completely or not at all; the last one is shown for two seconds."""
    content = io.BytesIO()
    durations = [*([_FRAME_MS] * (len(frames) - 1)), _LAST_FRAME_MS]
    first, *others = [frame.quantize(_COLOURS, dither=Image.Dither.NONE) for frame in frames]
    first.save(content, "gif", save_all=True, append_images=others, duration=durations, loop=0)
    write_file(path, content.getvalue())


def read_strip(path: Path, count: int) -> npt.NDArray[np.uint8]:
    """Read the `count` images that `write_strip` wrote, `(count, height, width, 3)` uint8."""
    return np.stack(np.split(np.asarray(Image.open(path).convert("RGB")), count, axis=1))
