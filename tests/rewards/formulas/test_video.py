"""Rewards of videos that need no model, and what rewards say of the kinds that they take."""

from typing import Any

import numpy as np
import pytest

from rewards import evaluate_reward, kind_of, kinds_of, load_reward, takes
from rewards.formulas.jpeg import jpeg_kilobytes
from rewards.formulas.video import temporal_consistency

RNG = np.random.default_rng(0)


def score(name: Any, samples: Any) -> Any:
    return evaluate_reward(load_reward(name), samples, ["a"] * len(samples), [{}] * len(samples))[0]


def test_jpeg_size_of_a_video_is_the_mean_of_its_frames() -> None:
    videos = RNG.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    frames = [jpeg_kilobytes(video) for video in videos]
    np.testing.assert_allclose(score("jpeg_incompressibility", videos), [one.mean() for one in frames])
    np.testing.assert_allclose(score("jpeg_compressibility", videos), [-one.mean() for one in frames])


def test_steady_change_costs_nothing_and_flicker_costs_most() -> None:
    steps = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 4, 4, 3), np.uint8)
    still, brighter, flicker = np.zeros_like(steps), 10 * steps, 255 * (steps % 2)
    scores, details = temporal_consistency(np.stack([still, brighter, flicker]), [], [])
    np.testing.assert_allclose(scores, [0, 0, -255])
    np.testing.assert_allclose(details["motion"], [0, 10, 255])
    with pytest.raises(ValueError, match="at least 3 frames for temporal_consistency; got 2"):
        temporal_consistency(np.zeros((1, 2, 4, 4, 3), np.uint8), [], [])


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((2, 8, 8, 3), np.uint8, "image"),
        ((2, 5, 8, 8, 3), np.uint8, "video"),
        ((2, 2, 100), np.float32, "audio"),
        ((2, 2), np.float32, "other"),
        ((2, 8, 8, 3), np.float32, "other"),
        ((2, 8, 8, 1), np.uint8, "other"),
    ],
)
def test_samples_are_of_a_kind(shape: tuple[int, ...], dtype: Any, kind: str) -> None:
    assert kind_of(np.zeros(shape, dtype)) == kind


def test_rewards_say_what_they_take() -> None:
    assert kinds_of(load_reward("jpeg_compressibility")) == ("image", "video")
    assert kinds_of(load_reward("temporal_consistency")) == ("video",)
    assert kinds_of(load_reward("temporal_consistency:1,jpeg_compressibility:1")) == ("video",)
    assert kinds_of(lambda samples, prompts, metadata: [0.0]) == ("image", "video", "audio", "other")
    assert kinds_of(takes("audio")(lambda samples, prompts, metadata: [0.0])) == ("audio",)
    with pytest.raises(
        ValueError, match=r"temporal_consistency scores videos, uint8 \(batch, frames.*got uint8 of shape"
    ):
        score("temporal_consistency", np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="jpeg_compressibility scores images, .* or videos"):
        score("jpeg_compressibility", np.zeros((1, 2, 100), np.float32))
