"""A log of some of the images that a judge saw and of its answers, in a folder for people to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rewards.judge.protocol import encode_jpeg


class AnswerLog:
    """Writes images as `NNNNNN.jpg` and one line of JSON for each to `answers.jsonl`; continues an existing log."""

    def __init__(self, folder: str | Path | None = None, per_call: int = 4) -> None:
        """Take the folder, if there is one already, and the number of images to log of each call.

        Raises:
            ValueError: `per_call` is less than 1.
        """
        if per_call < 1:
            raise ValueError(f"log_per_call must be at least 1; got {per_call}")
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
            self._next = 1 + max((int(path.stem) for path in self.folder.glob("[0-9]*.jpg")), default=0)
        chosen = np.unique(np.linspace(0, len(images) - 1, min(self.per_call, len(images))).round().astype(int))
        with (self.folder / "answers.jsonl").open("a", encoding="utf-8") as lines:
            for index in chosen.tolist():
                name = f"{self._next:06d}.jpg"
                (self.folder / name).write_bytes(encode_jpeg(images[index]))
                line = {
                    "image": name,
                    "prompt": prompts[index],
                    "questions": list(questions[index]),
                    "answers": list(answers[index]),
                    "score": float(scores[index]) if np.isfinite(scores[index]) else None,
                }
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                self._next += 1
