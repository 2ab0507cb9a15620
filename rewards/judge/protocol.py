"""What a judge is: something that looks at images and answers questions about them in text.

A judge is a model in this process (`judge_model.py`), a server (`judge_server.py`) or a user's own object. The rewards
that ask a judge do not know which.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITY = 80


@runtime_checkable
class Judge(Protocol):
    """Answers questions about images."""

    def ask(self, images: Sequence[NDArray[np.uint8]], questions: Sequence[str]) -> list[str]:
        """Answer one question about each image, (height, width, 3) uint8. An empty text means no answer."""
        ...

    def load(self) -> None:
        """Load the model, or check that the server answers."""
        ...

    def unload(self) -> None:
        """Release memory and connections; the next question takes them again."""
        ...


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """Return an image as the JPEG file that a server receives, of quality 80 as in the DDPO paper's code."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
