"""Images, videos and sounds of a run as data URIs, so that the report is one file; larger ones are made smaller."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from agents.report.evaluation_files import SHOWN, evaluation_name
from agents.report.run_data import RunData, own_file
from agents.report.sample_files import sample_paths

MOST_CHARACTERS = 4_000_000
"""Largest length of all images of a report together, as text. A report of a longer run shows fewer evaluations."""
_LOSSLESS_SIDE, _LONGEST_SIDE = 128, 384
_LARGEST_PIXELS = 200_000_000


@dataclass(frozen=True)
class Pictures:
    """What the report shows of the held-out samples of a run.

    Attributes:
        iterations: of the evaluations that are shown, in order.
        images: data URIs, one list for each of these evaluations with one entry for each shown sample.
        clips: the same of videos or sounds; empty lists where there are none.
        stored: number of evaluations in the run folder.
    """

    iterations: Sequence[int]
    images: Sequence[Sequence[str]]
    clips: Sequence[Sequence[str]]
    stored: int


def pictures_of(run: RunData, most_characters: int) -> Pictures:
    """Return the images of as many evaluations as fit, evenly spaced; the first and the last are always there.

    Args:
        run: whose folder holds them.
        most_characters: of all data URIs together.

    Raises:
        ValueError: for a file that is no such image, naming it.
    """
    folder = run.path / "samples" / "images"
    stored = [
        iteration
        for iteration, _ in run.curve("eval/reward_mean")
        if own_file(folder / f"{evaluation_name(iteration)}.png")
    ]
    if not stored:
        return Pictures([], [], [], 0)
    shown = {iteration: _evaluation(run, folder, iteration) for iteration in (stored[0], stored[-1])}
    size = max(sum(map(len, images + clips)) for images, clips in shown.values())
    count = min(len(stored), max(2, most_characters // max(1, size)))
    for index in np.unique(np.linspace(0, len(stored) - 1, count).round().astype(int)).tolist():
        if stored[index] not in shown:
            shown[stored[index]] = _evaluation(run, folder, stored[index])
    iterations = sorted(shown)
    return Pictures(
        iterations, [shown[one][0] for one in iterations], [shown[one][1] for one in iterations], len(stored)
    )


def picture_uri(path: Path) -> str:
    """Return a JPEG image of a log as a data URI, made smaller if it is large.

    Raises:
        ValueError: if it is no such image.
    """
    with _opened(path, "JPEG") as image:
        if max(image.size) <= _LONGEST_SIDE:
            return _uri(path.read_bytes(), "image/jpeg")
        return _encoded(image.convert("RGB"))


def _evaluation(run: RunData, folder: Path, iteration: int) -> tuple[list[str], list[str]]:
    """Return the images of an evaluation, and its videos or sounds."""
    name, record = evaluation_name(iteration), run.records.get(iteration)
    samples = len(record.prompts) if record is not None else run.count("eval_samples") or SHOWN
    count = min(SHOWN, samples)
    path = folder / f"{name}.png"
    with _opened(path, "PNG") as strip:
        if strip.width % count:
            raise ValueError(f"{str(path)!r} must hold {count} images side by side; got a width of {strip.width}")
        side, whole = strip.width // count, strip.convert("RGB")
    images = [_encoded(whole.crop((side * index, 0, side * (index + 1), whole.height))) for index in range(count)]
    clips = [_uri(file.read_bytes(), _type_of(file)) for file in sample_paths(folder, name)[:count] if own_file(file)]
    return images, clips


def _opened(path: Path, kind: str) -> Image.Image:
    try:
        image = Image.open(path, formats=[kind])
        if image.width * image.height > _LARGEST_PIXELS:
            raise ValueError(f"it has {image.width} × {image.height} pixels")
        image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} must be a {kind} image of the run; {error}") from None
    return image


def _encoded(image: Image.Image) -> str:
    content = io.BytesIO()
    if max(image.size) <= _LOSSLESS_SIDE:
        image.save(content, "png")
        return _uri(content.getvalue(), "image/png")
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    image.save(content, "webp", quality=82)
    return _uri(content.getvalue(), "image/webp")


def _type_of(path: Path) -> str:
    return "audio/wav" if path.suffix == ".wav" else "image/webp"


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
