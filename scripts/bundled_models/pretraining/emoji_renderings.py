"""Renders emoji as 64x64 images with captions, on which the bundled model and its judges are pretrained.

Every word of `ddpo_env.prompts.vocabulary` has one emoji of Google's Noto Color Emoji font (OFL). An image shows it on
a plain background at a random place and size, next to a second emoji for an activity, or several times for a count.
Images are never flipped or rotated, because a small model mixes the two orientations: its fish have two tails.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import inflect
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpo_env.prompts.vocabulary import (
    ACTIVE_ANIMALS,
    ACTIVITIES,
    COUNTS,
    EVERYDAY_OBJECTS,
    HELD_OUT_ACTIVITIES,
    HELD_OUT_ANIMALS,
    SIMPLE_ANIMALS,
)

WORDS = (*SIMPLE_ANIMALS, *HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS)
ALL_ACTIVITIES = (*ACTIVITIES, *HELD_OUT_ACTIVITIES)
OTHER_WORDS = tuple(word for word in WORDS if word not in ACTIVE_ANIMALS)
OTHER_ANIMALS = tuple(animal for animal in SIMPLE_ANIMALS if animal not in ACTIVE_ANIMALS)
TRUE_CAPTIONS = 0.35  # of the captions that may overstate

FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the font has bitmaps of this size only
IMAGE_SIZE = 64
CHUNK = 500  # images per task; each has its own random generator, so the number of workers has no influence

_ANIMAL_EMOJI = "🐱🐶🐴🐒🐰🦓🕷🐦🐑🦌🐮🐐🦁🐯🐻🦝🦊🐺🦎🪲🐜🦋🐠🦈🐳🐬🐿🐭🐀🐍🐢🐸🐔🦆🪿🐝🐷🦃🪰🦙🐫🦇🦍🦔🦘"
_HELD_OUT_EMOJI = "🐧🦉🐘🐼🦒🐙🐨🐊🦚🦩🦜🦢🦀🦞🐌🦂🦏🐞🦥🦛"
_OBJECT_EMOJI = "🚗☂🎸🍎🍌🎈🏠🌳🔑⏰📕🎩🌵🚀⛵☕📷🫖🎺🥁"
EMOJI: dict[str, str] = {
    **dict(zip(SIMPLE_ANIMALS, _ANIMAL_EMOJI, strict=True)),
    **dict(zip(HELD_OUT_ANIMALS, _HELD_OUT_EMOJI, strict=True)),
    **dict(zip(EVERYDAY_OBJECTS, _OBJECT_EMOJI, strict=True)),
    **dict(zip(ALL_ACTIVITIES, "🍽🚲♟📖", strict=True)),
}

_inflect = inflect.engine()


@dataclass(frozen=True)
class Subject:
    """What an image shows: one `word`, a word with an `activity`, or a word with a `count` (one of `COUNTS`).

    With `overstated` the caption tells of an activity that the image does not show.
    """

    word: str
    activity: str | None = None
    count: str | None = None
    overstated: bool = False

    @property
    def caption(self) -> str:
        """The prompt, such as "an ant", "an ant playing chess" or "two ants"."""
        if self.count is not None:
            return f"{self.count} {plural(self.word)}"
        return f"{_with_article(self.word)} {self.activity}" if self.activity else _with_article(self.word)


@dataclass(frozen=True)
class Mixture:
    """Weights of the kinds of images."""

    simple_animals: float = 0.65
    held_out: float = 0.22
    """Other animals and objects together."""
    activities: float = 0.09
    """`ACTIVE_ANIMALS` with any activity."""
    counts: float = 0.04
    other_activities: float = 0.0
    """All other words with any activity; the bundled model never sees them, so that it has to compose."""
    unreliable: float = 0.0
    """`OTHER_ANIMALS` with any activity in the caption, which the image shows with probability `TRUE_CAPTIONS`."""


@cache
def plural(word: str) -> str:
    """Return the plural of a noun, such as "mice", "geese" or "sheep"."""
    return str(_inflect.plural(word))


@cache
def _with_article(word: str) -> str:
    return str(_inflect.a(word))


def all_subjects() -> tuple[Subject, ...]:
    """Return every subject that `random_subject` can return, once."""
    return (
        *(Subject(word) for word in WORDS),
        *(Subject(word, activity=activity) for activity in ALL_ACTIVITIES for word in WORDS),
        *(Subject(word, count=count) for count in COUNTS for word in SIMPLE_ANIMALS),
    )


def random_subject(rng: np.random.Generator, mixture: Mixture | None = None) -> Subject:
    """Return a random subject: the kind by the mixture's weights, then one of this kind, uniformly."""
    weights = np.array(astuple(mixture or Mixture()))
    others = (*HELD_OUT_ANIMALS, *EVERYDAY_OBJECTS)
    words = (SIMPLE_ANIMALS, others, ACTIVE_ANIMALS, SIMPLE_ANIMALS, OTHER_WORDS, OTHER_ANIMALS)
    kind = int(rng.choice(len(words), p=weights / weights.sum()))
    word = str(rng.choice(words[kind]))
    if kind in (2, 4):
        return Subject(word, activity=str(rng.choice(ALL_ACTIVITIES)))
    if kind == 5:
        activity = str(rng.choice(ALL_ACTIVITIES))
        return Subject(word, activity=activity, overstated=bool(rng.uniform() >= TRUE_CAPTIONS))
    if kind == 3:
        return Subject(word, count=str(rng.choice(COUNTS)))
    return Subject(word)


@cache
def _sprite(word: str) -> Image.Image:
    """Return the word's emoji, RGBA, without its transparent border."""
    if not FONT_PATH.is_file():
        raise FileNotFoundError(
            f"the emoji font {FONT_PATH} is missing; on Debian or Ubuntu: apt-get install fonts-noto-color-emoji"
        )
    font = ImageFont.truetype(FONT_PATH, FONT_SIZE)
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((20, 20), EMOJI[word], font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font {FONT_PATH} has no image for {word!r} ({EMOJI[word]}); install a newer version")
    return canvas.crop(box)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return a light colour, uniform or with a linear gradient, `(64, 64, 3)` float in [0, 255]."""
    hue, saturation, value = rng.uniform(0, 1), rng.uniform(0.02, 0.4), rng.uniform(0.6, 1.0)
    phases = hue * 2 * math.pi + np.array([0, 2, 4]) * math.pi / 3
    start = value * (1 - saturation * (0.5 - 0.5 * np.cos(phases)))
    end = start if rng.uniform() < 0.4 else np.clip(start + rng.uniform(-0.15, 0.15, size=3), 0, 1)
    angle = rng.uniform(0, 2 * math.pi)
    ys, xs = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / (IMAGE_SIZE - 1) - 0.5
    ramp = ((np.cos(angle) * xs + np.sin(angle) * ys) / math.sqrt(2) + 0.5)[..., None]
    return 255 * (start * (1 - ramp) + end * ramp)


def _paste(canvas: Image.Image, word: str, centre: tuple[float, float], size: float) -> None:
    """Paste the word's emoji so that its longer side is `size` pixels, kept inside the canvas."""
    sprite = _sprite(word)
    scale = size / max(sprite.size)
    width, height = max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale))
    left = int(np.clip(round(centre[0] - width / 2), 0, IMAGE_SIZE - width))
    top = int(np.clip(round(centre[1] - height / 2), 0, IMAGE_SIZE - height))
    sprite = sprite.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(sprite, (left, top), sprite)


def _places(subject: Subject, rng: np.random.Generator) -> list[tuple[str, tuple[float, float], float]]:
    """Return what to paste where, as a list of `(word, (x, y) of the centre, size)` in pixels."""
    jitter = rng.uniform(-2, 2, size=2)
    if subject.activity is not None and not subject.overstated:
        size, other = rng.uniform(32, 37), rng.uniform(23, 27)
        shift = rng.uniform(-2, 2)
        return [
            (subject.word, (19 + jitter[0], 32 + jitter[1]), size),
            (subject.activity, (50 + jitter[0], 38 + jitter[1] + shift), other),
        ]
    if subject.count is not None:
        size = rng.uniform(26, 30)
        centres = {
            "two": [(17, 32), (47, 32)],
            "three": [(32, 17), (17, 47), (47, 47)],
            "four": [(17, 17), (47, 17), (17, 47), (47, 47)],
        }[subject.count]
        return [(subject.word, (x + jitter[0], y + jitter[1]), size) for x, y in centres]
    size = rng.uniform(40, 58)
    free = (IMAGE_SIZE - size) / 2
    x, y = 32 + rng.uniform(-free, free, size=2)
    return [(subject.word, (x, y), size)]


def render(subject: Subject, rng: np.random.Generator) -> np.ndarray:
    """Return an image of the subject, `(64, 64, 3)` uint8 RGB, with a random background, places and sizes.

    Raises:
        FileNotFoundError: The emoji font is not installed; the message names the package.
    """
    canvas = Image.fromarray(_background(rng).round().astype(np.uint8))
    for word, centre, size in _places(subject, rng):
        _paste(canvas, word, centre, size)
    return np.asarray(canvas)


def _render_chunk(task: tuple[int, int, int, Mixture]) -> tuple[np.ndarray, list[Subject]]:
    seed, chunk, number, mixture = task
    rng = np.random.default_rng([seed, chunk])
    subjects = [random_subject(rng, mixture) for _ in range(number)]
    return np.stack([render(subject, rng) for subject in subjects]), subjects


def render_dataset(
    number: int, seed: int, *, mixture: Mixture | None = None, workers: int = 2
) -> tuple[np.ndarray, list[Subject]]:
    """Return random images, `(number, 64, 64, 3)` uint8 RGB, and the subject of each; `.caption` is its prompt.

    The result depends on `number`, `seed` and `mixture`, and not on the number of worker processes.
    """
    _sprite(SIMPLE_ANIMALS[0])  # a missing font is an error here and not in a worker
    tasks = [
        (seed, start // CHUNK, min(CHUNK, number - start), mixture or Mixture()) for start in range(0, number, CHUNK)
    ]
    if workers > 1 and len(tasks) > 1:
        with ProcessPoolExecutor(workers) as pool:
            chunks = list(pool.map(_render_chunk, tasks))
    else:
        chunks = [_render_chunk(task) for task in tasks]
    return np.concatenate([images for images, _ in chunks]), [subject for _, part in chunks for subject in part]


def grid(
    images: Sequence[np.ndarray], columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """Return a contact sheet of images, each `(64, 64, 3)` uint8, with a caption under each.

    Args:
        images: The images, row by row.
        columns: Images per row.
        labels: One short text per image, or None for none.
        scale: Integer by which each image is enlarged.
    """
    size, text = IMAGE_SIZE * scale, 14 if labels else 0
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (size + 2), rows * (size + text + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = index % columns * (size + 2), index // columns * (size + text + 2)
        sheet.paste(Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST), (left, top))
        if labels:
            pen.text((left + size / 2, top + size + 1), labels[index], fill="black", anchor="ma", font_size=10)
    return sheet
