"""Rewards with a state, for tests of what measures and scores in two stages."""

from typing import Any

import numpy as np


class Remembering:
    """Brightness above the mean of all that was seen: a state, and no way to share it."""

    def __init__(self) -> None:
        self.seen = 0
        self.total = 0.0

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        return self.above_average(brightnesses(images))

    def above_average(self, scores: np.ndarray) -> np.ndarray:
        self.seen += len(scores)
        self.total += float(scores.sum())
        return scores - self.total / max(self.seen, 1)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.total = state["seen"], state["total"]


class Shareable(Remembering):
    """The same in two stages."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        return self.combine(self.measure(images, prompts, metadata))

    def measure(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        return brightnesses(images)

    def combine(self, measurements: Any) -> tuple[np.ndarray, dict[str, Any]]:
        scores = self.above_average(np.array(measurements))
        return scores, {"seen": [float(self.seen)] * len(scores)}


def brightnesses(images: np.ndarray) -> np.ndarray:
    """Mean pixel of each image, 0 to 1."""
    return images.mean(axis=tuple(range(1, images.ndim))) / 255
