"""Random images and prompts."""

import numpy as np
from numpy.typing import NDArray

PROMPTS = ["a cat", "a dog", "an ant", "a fox"]


def random_images(batch: int, seed: int = 0, height: int = 16, width: int = 16) -> NDArray[np.uint8]:
    """Noise that grows along the batch, so that the JPEG size of every image differs."""
    noise = np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3))
    return (noise * np.linspace(0.1, 1, batch).reshape(-1, 1, 1, 1)).astype(np.uint8)
