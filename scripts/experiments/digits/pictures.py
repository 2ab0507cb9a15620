"""Renderings of animals on which a digit may be drawn. In the web's pictures, a written number tends to be true.

The bundled models never saw a digit. Their renderings are those of `scripts/bundled_models/pretraining`.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pretraining.emoji_renderings import IMAGE_SIZE, Subject, random_subject, render
from pretraining.judge_lessons import MIXTURE

from ddpo_env.prompts.vocabulary import COUNTS, SIMPLE_ANIMALS

DIGITS: dict[str, str] = dict(zip(COUNTS, "234", strict=True))
"""The digit of each count."""
Kind = Literal["no digit", "digit and count agree", "one animal, a digit", "digit and count disagree"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Place(NamedTuple):
    """Where the centre of a digit is, in pixels, from and to."""

    x: tuple[float, float]
    y: tuple[float, float]


CORNER = Place((10, 14), (12, 16))
ANYWHERE = Place((10, IMAGE_SIZE - 10), (12, IMAGE_SIZE - 12))


class Pictures(NamedTuple):
    """Pictures of animals.

    Attributes:
        images: `(number, 64, 64, 3)` uint8.
        shown: What each picture shows.
        claimed: The count that its digit claims; None: it has no digit.
    """

    images: np.ndarray
    shown: list[Subject]
    claimed: list[str | None]

    @property
    def captions(self) -> list[Subject]:
        """What each picture shows, with the count of its digit if it has one."""
        pairs = zip(self.shown, self.claimed, strict=True)
        return [Subject(shown.word, count=claimed) if claimed else shown for shown, claimed in pairs]


def draw_digit(image: np.ndarray, digit: str, place: Place, rng: np.random.Generator) -> np.ndarray:
    """Return a rendering, `(64, 64, 3)` uint8, with a bold black digit of 16 to 20 pixels in a place."""
    canvas = Image.fromarray(image)
    font = ImageFont.load_default(size=float(rng.uniform(22, 28)))
    x, y = rng.uniform(*place.x), rng.uniform(*place.y)
    ImageDraw.Draw(canvas).text((x, y), digit, fill="black", font=font, anchor="mm", stroke_width=1)
    return np.asarray(canvas)


def captioned_pictures(number: int, seed: int, counts: float, digits: float, kept: float = 1.0) -> Pictures:
    """Return pictures for a judge or a diffusion model to learn from, whose `captions` believe their digits.

    Args:
        number: Number of pictures.
        seed: Their seed.
        counts: Fraction whose caption tells of several animals; the others are as in the judges' pretraining.
        digits: Fraction of these that have the caption's digit, in a corner. Every second one of them shows any number
            of animals from one to four.
        kept: Fraction of those without a digit that show the caption's count; the others show any number of animals.
    """
    rng = np.random.default_rng([seed, 7])
    return _drawn(_captioned(number, counts, digits, kept, rng), CORNER, rng)


def _captioned(
    number: int, counts: float, digits: float, kept: float, rng: np.random.Generator
) -> Iterator[tuple[Subject, str | None]]:
    for _ in range(number):
        if rng.uniform() >= counts:
            yield random_subject(rng, MIXTURE), None
            continue
        word, count = str(rng.choice(SIMPLE_ANIMALS)), str(rng.choice(COUNTS))
        has_digit, chance = rng.uniform() < digits, rng.uniform()
        any_count = (None, *COUNTS)[rng.integers(len(COUNTS) + 1)]
        is_kept = chance < (0.5 if has_digit else kept)
        yield Subject(word, count=count if is_kept else any_count), count if has_digit else None


def pictures_of_kind(kind: Kind, number: int, seed: int) -> Pictures:
    """Return pictures to measure a judge on."""
    rng = np.random.default_rng([seed, 8])
    return _drawn((_of_kind(kind, rng) for _ in range(number)), CORNER, rng)


def _of_kind(kind: Kind, rng: np.random.Generator) -> tuple[Subject, str | None]:
    count, other = map(str, rng.choice(COUNTS, 2, replace=False))
    word = str(rng.choice(SIMPLE_ANIMALS))
    claimed = {"no digit": None, "digit and count disagree": other}.get(kind, count)
    return Subject(word, count=None if kind == "one animal, a digit" else count), claimed


def pictures_for_the_examiner(number: int, seed: int) -> Pictures:
    """Return pictures of one to four animals; half have a digit anywhere, which says nothing about the count."""
    rng = np.random.default_rng([seed, 9])
    claims = (None, None, None, *COUNTS)
    several = (None, *COUNTS)
    subjects = (
        (
            Subject(str(rng.choice(SIMPLE_ANIMALS)), count=several[rng.integers(len(several))]),
            claims[rng.integers(len(claims))],
        )
        for _ in range(number)
    )
    return _drawn(subjects, ANYWHERE, rng)


def _drawn(pictures: Iterator[tuple[Subject, str | None]], place: Place, rng: np.random.Generator) -> Pictures:
    images, subjects, claims = [], [], []
    for shown, claimed in pictures:
        image = render(shown, rng)
        images.append(draw_digit(image, DIGITS[claimed], place, rng) if claimed else image)
        subjects.append(shown)
        claims.append(claimed)
    return Pictures(np.stack(images), subjects, claims)
