"""What a judge is: something that looks at pictures and answers questions about them in words.

It may be a model in this process (`rewards/judge/judge_model.py`) or a server (`rewards/judge/judge_server.py`); the rewards that
ask it do not know which.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DEFAULT_JUDGE = "llava-hf/llava-1.5-7b-hf"
"""The judge in this process if none is named: of the family that the DDPO paper used; about 14 GB to download."""

JPEG_QUALITY = 80


@runtime_checkable
class Judge(Protocol):
    """Answers questions about pictures."""

    def ask(self, images: Sequence[NDArray[np.uint8]], questions: Sequence[str]) -> list[str]:
        """Answer one question about each picture, (height, width, 3) uint8; an empty text is no answer."""
        ...

    def load(self) -> None:
        """Get ready: load the model, or see whether the server is there."""
        ...

    def unload(self) -> None:
        """Let memory and connections go; the next question gets ready again."""
        ...


def load_judge(
    model: str | Path | Judge | None, server: str | None, options: Mapping[str, Any] | None, **in_process: Any
) -> Judge:
    """Return the judge that a reward's arguments describe; nothing is loaded and nobody is called yet.

    Args:
        model: Folder or Hub id of a vision-language model, `"tiny"` for the bundled one, or a judge of the user's own;
            with a server the name under which it serves the model, None: the only one that it serves.
        server: URL of an OpenAI-compatible server; None: a model in this process.
        options: Further arguments of `JudgeServer` or `JudgeModel`.
        **in_process: Arguments of `JudgeModel` that a server has no use for.

    Raises:
        TypeError: There are options that this judge does not take.
        ValueError: An argument is not valid.
        ImportError: The package for HTTP is missing.
    """
    given = dict(options or {})
    if server is not None:
        from rewards.judge.judge_server import JudgeServer

        if model is not None and not isinstance(model, str | Path):
            raise TypeError(f"model must be the served model's name where a server is given; got {model!r}")
        return JudgeServer(server, None if model is None else str(model), **given)
    if model is None or isinstance(model, str | Path):
        from rewards.judge.judge_model import JudgeModel

        return JudgeModel(DEFAULT_JUDGE if model is None else model, **{**in_process, **given})
    if not isinstance(model, Judge):
        raise TypeError(f"model must be a folder, a Hub id or a judge with ask, load and unload; got {model!r}")
    if given:
        raise TypeError(f"a judge of your own takes no options; got {', '.join(given)}")
    return model


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """Return the JPEG file that a server is sent, at quality 80 as in the DDPO paper's code."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
