"""A sample of what a judge saw and said, kept in a folder for people to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rewards.judge.loading import encode_jpeg


class AnswerLog:
    """Writes pictures as `NNNNNN.jpg` and a line of JSON each to `answers.jsonl`; goes on in a folder that has some."""

    def __init__(self, folder: str | Path, per_call: int = 4) -> None:
        """Say where, and how many pictures of each call of the reward.

        Raises:
            ValueError: `per_call` is less than 1.
        """
        if per_call < 1:
            raise ValueError(f"log_per_call must be at least 1; got {per_call}")
        self.folder = Path(folder)
        self.per_call = per_call
        self._next: int | None = None

    def record(
        self,
        images: Sequence[NDArray[np.uint8]],
        prompts: Sequence[str],
        questions: Sequence[Sequence[str]],
        answers: Sequence[Sequence[str]],
        scores: Sequence[float],
    ) -> None:
        """Keep pictures at even distances of the batch, as JPEG of the quality that servers are sent.

        Args:
            images: Each (height, width, 3) uint8.
            prompts: One a picture.
            questions: What was asked about each picture.
            answers: What was answered to each question.
            scores: One a picture.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._next is None:
            self._next = 1 + max((int(path.stem) for path in self.folder.glob("[0-9]*.jpg")), default=0)
        chosen = np.unique(np.linspace(0, len(images) - 1, min(self.per_call, len(images))).round().astype(int))
        with (self.folder / "answers.jsonl").open("a", encoding="utf-8") as lines:
            for index in chosen.tolist():
                name = f"{self._next:06d}.jpg"
                (self.folder / name).write_bytes(encode_jpeg(images[index]))
                line = {
                    "picture": name,
                    "prompt": prompts[index],
                    "questions": list(questions[index]),
                    "answers": list(answers[index]),
                    "score": float(scores[index]) if np.isfinite(scores[index]) else None,
                }
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                self._next += 1
