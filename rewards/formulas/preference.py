"""A stated formula for which images people like: a colourful subject of a sensible size on a calm background.

It is the *true* preference of the bundled aesthetic predictor (`rewards.clip.aesthetic`, `model="tiny"`). That head was
trained on ratings, which are this score with noise, and only approximates it, as LAION's head approximates people. So
it can be measured whether the preference still rises when a policy is trained on the head.

Each of three parts is in [0, 1], and the score is `1 + 9 (0.45 colour + 0.3 contrast + 0.25 composition)`. Every part
falls again beyond its best value, because too much colour or contrast is not liked either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rewards.kinds import images_only
from rewards.protocol import Details, Images, Metadata

COLOUR, CONTRAST, COMPOSITION = 0.45, 0.3, 0.25
"""Weights of the parts; their sum is 1."""
_BEST_COLOUR, _COLOUR_WIDTH = 90.0, 40.0
"""Colourfulness of the subject. Hasler and Süsstrunk call 82 "highly colorful" and 109 "extremely colorful"."""
_CALM, _CALM_WIDTH = 40.0, 30.0
"""Colourfulness of the background up to which it is calm, and how much more is worth exp(-1/2) of the part."""
_BEST_CONTRAST, _CONTRAST_WIDTH = 50.0, 20.0
"""Standard deviation of the luma, in levels from 0 to 255."""
_SUBJECT = 40.0
"""Distance from the background in RGB, in levels, from which on a pixel belongs to the subject."""
_SIZES = (0.0, 0.2, 0.45, 0.9)
"""Fraction of the pixels that the subject covers: too small, from here on good, up to here good, too large."""
_ANCHORS = np.array([(0.5, 0.5), *((x, y) for x in (1 / 3, 2 / 3) for y in (1 / 3, 2 / 3))])
"""Good places of the subject's centre, in fractions of width and height: the middle, and the points of thirds."""
_PLACE_WIDTH = 0.08
"""Distance from the nearest of these places, in fractions of the side, at which the place is worth exp(-1/2)."""


@images_only
def tiny_preference(images: Images, prompts: Sequence[str], metadata: Metadata) -> tuple[NDArray[np.float64], Details]:
    """Score images from 1 to 10, (batch,). The details are the three parts; the prompts have no influence."""
    subject = subject_mask(images)
    calm = _bell(np.maximum(colourfulness(images, ~subject), _CALM), _CALM, _CALM_WIDTH)
    colour = calm * _bell(colourfulness(images, subject), _BEST_COLOUR, _COLOUR_WIDTH)
    contrast = _bell(luma_contrast(images), _BEST_CONTRAST, _CONTRAST_WIDTH)
    composition = _composition(subject)
    score = 1 + 9 * (COLOUR * colour + CONTRAST * contrast + COMPOSITION * composition)
    return score, {"colour": colour.tolist(), "contrast": contrast.tolist(), "composition": composition.tolist()}


def colourfulness(images: Images, where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return Hasler and Süsstrunk's colourfulness M̂(3) (2003, "Measuring colourfulness in natural images"), (batch,).

    With rg = R - G and yb = (R + G) / 2 - B it is √(σ²_rg + σ²_yb) + 0.3 √(μ²_rg + μ²_yb). Grey has 0.

    Args:
        images: (batch, height, width, 3) uint8.
        where: The pixels that count, (batch, height, width). An image without one has 0.
    """
    red, green, blue = np.moveaxis(images.astype(np.float64), -1, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    pixels = np.maximum(where.sum(axis=(1, 2)), 1)
    mean = (opponents * where).sum(axis=(2, 3)) / pixels
    variance = (((opponents - mean[:, :, None, None]) ** 2) * where).sum(axis=(2, 3)) / pixels
    return np.asarray(np.sqrt(variance.sum(axis=0)) + 0.3 * np.sqrt((mean**2).sum(axis=0)))


def luma_contrast(images: Images) -> NDArray[np.float64]:
    """Return the RMS contrast: the standard deviation of the luma (ITU-R BT.601), in levels from 0 to 255, (batch,)."""
    return np.asarray((images @ np.array([0.299, 0.587, 0.114])).std(axis=(1, 2)))


def subject_mask(images: Images) -> NDArray[np.bool_]:
    """Return which pixels differ from the background, (batch, height, width).

    The background is the plane that fits the colours of the border best (least squares), so it may have a gradient.
    """
    height, width = images.shape[1:3]
    edge = max(1, min(height, width) // 16)
    border = np.ones((height, width), dtype=bool)
    border[edge:-edge, edge:-edge] = False
    y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    design = np.stack([x, y, np.ones_like(x)], axis=-1)
    coefficients = np.linalg.pinv(design[border]) @ images[:, border].astype(np.float64)
    distance = np.linalg.norm(images - np.einsum("hwk,bkc->bhwc", design, coefficients), axis=-1)
    return np.asarray(distance > _SUBJECT)


def _composition(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return how well size and place of the subject are chosen, (batch,) in [0, 1]; 0 without a subject."""
    height, width = mask.shape[1:]
    size = np.interp(mask.mean(axis=(1, 2)), _SIZES, (0, 1, 1, 0))
    y, x = np.mgrid[0.5:height, 0.5:width]
    pixels = np.maximum(mask.sum(axis=(1, 2)), 1)
    centre = np.stack([(mask * axis).sum(axis=(1, 2)) / pixels for axis in (x / width, y / height)], axis=-1)
    distance = np.linalg.norm(centre[:, None] - _ANCHORS, axis=-1).min(axis=1)
    return np.asarray(size * _bell(distance, 0.0, _PLACE_WIDTH))


def _bell(values: NDArray[np.float64], best: float, width: float) -> NDArray[np.float64]:
    return np.exp(-0.5 * ((values - best) / width) ** 2)
