"""How smooth a video is: a reward for videos that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.kinds import takes
from rewards.protocol import Metadata


@takes("video")
def temporal_consistency(
    videos: NDArray[np.uint8], prompts: Sequence[str], metadata: Metadata
) -> tuple[NDArray[np.float64], dict[str, list[Any]]]:
    """Reward videos whose frames follow from each other: minus the mean change of acceleration, in levels of a pixel.

    A steady motion or brightening costs nothing, and flicker costs most: for three frames `a`, `b`, `c` the change is
    `|a - 2b + c| / 2`. A still video has the best score too, so the detail `motion` says how much frames differ.

    Args:
        videos: `(batch, frames, height, width, 3)`, at least three frames.
        prompts: one per video; not used.
        metadata: one dictionary per video; not used.

    Returns:
        The scores, `(batch,)`, from -255 to 0, and `motion`: the mean difference of frames that follow each other.

    Raises:
        ValueError: for fewer than three frames.
    """
    if videos.shape[1] < 3:
        raise ValueError(f"videos must have at least 3 frames for temporal_consistency; got {videos.shape[1]}")
    scores, motion = np.zeros(len(videos)), []
    for index, video in enumerate(videos):
        frames = video.astype(np.float32)
        change = np.diff(frames, axis=0)
        scores[index] = -np.abs(np.diff(change, axis=0)).mean(dtype=np.float64) / 2
        motion.append(float(np.abs(change).mean(dtype=np.float64)))
    return scores, {"motion": motion}
