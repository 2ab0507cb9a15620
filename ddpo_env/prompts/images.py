"""Images that prompts carry: for pipelines that start from an image, and for rewards that compare with one.

The entry `image` of a prompt's metadata is the path of an image file, or in code a `PIL.Image.Image`. A file is checked
when the prompts are loaded, and it is read again when a model encodes it, so that no large set is held in memory.
"""

from __future__ import annotations

import hashlib
import io
import reprlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE = "image"
"""Name of the entry of a prompt's metadata."""
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that Pillow reads by itself: for others, such as PostScript, it starts programs."""
_PROBLEMS: dict[type[Exception], str] = {
    FileNotFoundError: "there is no such file",
    UnidentifiedImageError: "it is none, or it is damaged",
}


class ImageDescription(NamedTuple):
    """What is known of an image without its pixels.

    Attributes:
        size: width and height in pixels, upright.
        digest: SHA-256 of the file, or of the pixels of an object.
    """

    size: tuple[int, int]
    digest: str


def read_image(image: Any, name: str) -> Image.Image:
    """Return an image upright and in RGB, as `diffusers.utils.load_image` does.

    Args:
        image: the path of a file, or an image.
        name: what it is, for the message.

    Raises:
        ValueError: for something else, or a file that is missing, damaged, too large or of another format.
    """
    if isinstance(image, Image.Image):
        return _upright(image)
    if not isinstance(image, str | Path) or not str(image):
        raise ValueError(f"{name} must be the path of an image file; got {reprlib.repr(image)}")
    try:
        return _upright(Image.open(io.BytesIO(Path(image).read_bytes()), formats=_FORMATS))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        what = _PROBLEMS.get(type(error), str(error))
        raise ValueError(
            f"{name} must be an image file ({', '.join(_FORMATS)}); {str(image)[:1000]!r}: {what}"
        ) from error


def describe_image(image: Any, name: str) -> ImageDescription:
    """Return the size and the content of an image, all of which is read; arguments and errors are `read_image`'s."""
    if isinstance(image, str | Path):
        with suppress(OSError, ValueError):  # which is said below, under its name
            state = Path(image).stat()
            return _describe_file(str(image), state.st_size, state.st_mtime_ns)
    pixels = read_image(image, name)
    return ImageDescription(pixels.size, hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest())


@lru_cache(maxsize=2**16)
def _describe_file(path: str, *_: int) -> ImageDescription:
    """Describe a file as long as it does not change."""
    return ImageDescription(read_image(path, IMAGE).size, hashlib.sha256(Path(path).read_bytes()).hexdigest())


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("RGB")
