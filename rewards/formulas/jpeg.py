"""JPEG size as a reward: the two tasks of the DDPO paper that need no model (arXiv 2305.13301, section 5.1).

The score is the size of the encoded image in kB (1000 bytes), or minus this size; of a video, the mean over its frames.
As in the authors' code, the quality is 95 and the chroma subsampling is the encoder's default.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.kinds import takes
from rewards.protocol import Images, Metadata

QUALITY = 95


def jpeg_kilobytes(images: Images) -> NDArray[np.float64]:
    """Return the JPEG size of each image in kB, or the mean of each video's frames, (batch,).

    Threads encode in parallel: Pillow releases the GIL.
    """
    if images.ndim == 5:
        return jpeg_kilobytes(images.reshape(-1, *images.shape[2:])).reshape(images.shape[:2]).mean(1)
    with ThreadPoolExecutor(max_workers=min(max(len(images), 1), _available_cores())) as pool:
        return np.fromiter(pool.map(_kilobytes, images), dtype=np.float64, count=len(images))


@takes("image", "video")
def jpeg_incompressibility(images: Images, prompts: Sequence[str], metadata: Metadata) -> NDArray[np.float64]:
    """Reward images or videos that do not compress well: their size in kB, (batch,)."""
    return jpeg_kilobytes(images)


@takes("image", "video")
def jpeg_compressibility(images: Images, prompts: Sequence[str], metadata: Metadata) -> NDArray[np.float64]:
    """Reward images or videos that compress well: minus their size in kB, (batch,)."""
    return -jpeg_kilobytes(images)


def _kilobytes(image: NDArray[np.uint8]) -> float:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
