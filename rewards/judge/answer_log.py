"""A log of some of the images that a judge saw and of its answers, in a folder for people to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rewards.judge.protocol import encode_jpeg
from rewards.registry import check_number

_LONGEST = 2000
"""Characters of a text in the log: a judge may answer with any number of them."""


class AnswerLog:
    """Writes images as `NNNNNN.jpg` and one line of JSON for each to `answers.jsonl`; continues an existing log.

    Texts of more than 2000 characters are cut. No existing image is overwritten, and no link is followed.
    """

    def __init__(self, folder: str | Path | None = None, per_call: int = 4) -> None:
        """Take the folder, if there is one already, and the number of images to log of each call.

        Raises:
            ValueError: `per_call` is no integer from 1 to 1,000,000, or `folder` is no path.
        """
        check_number("log_per_call", per_call, 1, 1_000_000)
        if folder is not None and not (isinstance(folder, str | Path) and str(folder)):
            raise ValueError(f"log_folder must be a folder or None; got {folder!r}")
        self.folder = None if folder is None else Path(folder)
        self.per_call = per_call
        self._next: int | None = None

    def use_folder(self, folder: Path) -> None:
        """Write to this folder from now on, unless there is a folder already."""
        self.folder = self.folder or folder

    def record(
        self,
        images: Sequence[NDArray[np.uint8]],
        prompts: Sequence[str],
        questions: Sequence[Sequence[str]],
        answers: Sequence[Sequence[str]],
        scores: Sequence[float],
    ) -> None:
        """Log `per_call` evenly spaced images of the batch; without a folder, do nothing.

        Args:
            images: Each (height, width, 3) uint8. They are written with the JPEG quality that servers receive.
            prompts: One per image.
            questions: The questions about each image.
            answers: The answer to each question.
            scores: One per image.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._next is None:
            numbers = [path.stem for path in self.folder.glob("*.jpg") if path.stem.isascii() and path.stem.isdecimal()]
            self._next = 1 + max(map(int, numbers), default=0)
        chosen = np.unique(np.linspace(0, len(images) - 1, min(self.per_call, len(images))).round().astype(int))
        path = self.folder / "answers.jsonl"
        with open(path, "a", encoding="utf-8", errors="replace", opener=open_without_links) as lines:
            for index in chosen.tolist():
                name = f"{self._next:06d}.jpg"
                with (self.folder / name).open("xb") as file:
                    file.write(encode_jpeg(images[index]))
                line = {
                    "image": name,
                    "prompt": _cut(prompts[index]),
                    "questions": [_cut(question) for question in questions[index]],
                    "answers": [_cut(answer) for answer in answers[index]],
                    "score": float(scores[index]) if np.isfinite(scores[index]) else None,
                }
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                self._next += 1


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [cut: {_LONGEST} of {len(text)} characters]"


def open_without_links(path: str, flags: int) -> int:
    """Open a file unless its name is a link, as the `opener` of `open`."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # Windows has no such flag
