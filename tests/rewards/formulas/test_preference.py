"""The formula of preference on images made by hand, and the bundled head that approximates it."""

import numpy as np
import pytest
from helpers.held_out_renderings import load_renderings
from helpers.paths import ROOT
from numpy.typing import NDArray

from rewards import evaluate_reward, load_reward
from rewards.formulas.preference import colourfulness, luma_contrast, subject_mask


def disc(
    colour: tuple[int, int, int], background: tuple[int, int, int] = (200, 210, 200), side: int = 64, **place: float
) -> NDArray[np.uint8]:
    """A disc on a plain background; `x`, `y` and `radius` are fractions of the side."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    inside = (x - place.get("x", 0.5)) ** 2 + (y - place.get("y", 0.5)) ** 2 < place.get("radius", 0.3) ** 2
    return np.where(inside[..., None], np.array(colour), np.array(background)).astype(np.uint8)


def score(image: NDArray[np.uint8]) -> float:
    return float(evaluate_reward(load_reward("tiny_preference"), image[None], ["a cat"], [{}])[0][0])


RED, GREY = (210, 60, 40), (120, 120, 120)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (disc(RED), disc(GREY)),
        (disc(RED), disc((190, 200, 190))),
        (disc(RED), disc(RED, radius=0.05)),
        (disc(RED), disc(RED, radius=0.7)),
        (disc(RED, radius=0.2), disc(RED, x=0.8, y=0.8, radius=0.18)),
        (disc(RED, x=1 / 3, y=1 / 3, radius=0.28), disc(RED, x=0.17, y=0.5, radius=0.28)),
        (disc(RED), disc((255, 0, 0), (0, 255, 0))),
        (disc(GREY), disc(GREY, (250, 150, 30))),
        (disc(RED), disc(RED, (250, 150, 30))),
        (disc(RED), np.full((64, 64, 3), 200, np.uint8)),
    ],
    ids=[
        "grey",
        "flat",
        "small",
        "too large",
        "in the corner",
        "third",
        "garish",
        "cast on grey",
        "cast on red",
        "empty",
    ],
)
def test_people_would_agree(better: NDArray[np.uint8], worse: NDArray[np.uint8]) -> None:
    assert score(better) > score(worse) + 0.5


def test_score_is_between_1_and_10_and_does_not_depend_on_the_size_of_the_image() -> None:
    empty = np.full((64, 64, 3), 200, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert 1 <= score(empty) < 2
    assert all(1 <= score(image) <= 10 for image in (noise, disc(RED)))
    assert score(disc(RED, side=256)) == pytest.approx(score(disc(RED)), abs=0.15)


def test_colourfulness_is_that_of_the_paper() -> None:
    """Two halves, red and grey: rg is 255 or 0, and yb 127.5 or 0; of two values, mean and deviation are the half."""
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, :4, :, 0] = 255
    everywhere = np.ones((1, 8, 8), dtype=bool)
    expected = 1.3 * np.hypot(127.5, 63.75)
    np.testing.assert_allclose(colourfulness(image, everywhere), [expected])
    np.testing.assert_allclose(colourfulness(np.full((1, 8, 8, 3), 99, np.uint8), everywhere), [0])
    red = image[..., 0] == 255
    np.testing.assert_allclose(colourfulness(image, red), [0.3 * np.hypot(255, 127.5)])
    np.testing.assert_allclose(colourfulness(image, ~red), [0])
    np.testing.assert_allclose(colourfulness(image, ~everywhere), [0])


def test_contrast_of_half_black_half_white() -> None:
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, :4] = 255
    np.testing.assert_allclose(luma_contrast(image), [127.5])


def test_gradient_of_the_background_is_no_subject() -> None:
    ramp = np.broadcast_to(np.linspace(80, 220, 64)[None, :, None], (64, 64, 3)).astype(np.uint8)
    assert not subject_mask(ramp[None]).any()
    with_disc = np.where(disc(RED)[..., :1] == RED[0], disc(RED), ramp)
    expected = disc(RED)[..., 0] == RED[0]
    assert (subject_mask(with_disc[None])[0] == expected).mean() > 0.97


def test_bundled_head_approximates_the_preference_of_held_out_renderings() -> None:
    """Offline, and neither perfect nor useless."""
    images, _ = load_renderings()
    prompts, metadata = [""] * len(images), [{}] * len(images)
    judged, _ = evaluate_reward(load_reward("aesthetic", model="tiny", device="cpu"), images, prompts, metadata)
    true, _ = evaluate_reward(load_reward("tiny_preference"), images, prompts, metadata)
    assert 0.6 < np.corrcoef(np.argsort(np.argsort(judged)), np.argsort(np.argsort(true)))[0, 1] < 0.97
    assert 0 < judged.min() < judged.max() < 11
    assert (ROOT / "rewards/data/tiny_aesthetic/head.safetensors").stat().st_size < 2000
