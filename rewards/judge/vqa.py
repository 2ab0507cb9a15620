"""Questions about the picture, from the prompt's metadata: the share that the judge answers as it should.

This is how the DDPO authors' code scores counting prompts ("two dogs"). They look for the expected answer anywhere in
the text, so that "one" is found in "none"; here it must be there as words.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.judge.answer_log import AnswerLog
from rewards.judge.loading import Judge, load_judge
from rewards.protocol import Details, Images, Metadata, images_only

if TYPE_CHECKING:
    import inflect

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def answers_match(expected: str, answer: str) -> bool:
    """Tell whether the expected answer occurs in the given one.

    Both are cut into words, without case, punctuation and articles; numbers up to twenty are the same in letters and in
    digits, and nouns in singular and plural (their number is another question's business). The words of the expected
    answer must then stand in the given one, next to each other and in their order. Nothing else is understood:
    "no dogs" contains "dogs".
    """
    wanted, given = _words(expected), _words(answer)
    starts = range(len(given) - len(wanted) + 1)
    return bool(wanted) and any(given[start : start + len(wanted)] == wanted for start in starts)


@images_only
class VlmVqa:
    """The share of the metadata's `questions` that a judge answers with the word or words of its `answers`."""

    __name__ = "vlm_vqa"

    def __init__(
        self,
        model: str | Path | Judge | None = None,
        server: str | None = None,
        *,
        judge_options: Mapping[str, Any] | None = None,
        device: str | torch.device = "auto",
        log_folder: str | Path | None = None,
        log_per_call: int = 4,
    ) -> None:
        """Check the arguments; nothing is loaded and nobody is asked yet.

        Args:
            model: The judge, as in `VlmAlignment`.
            server: URL of an OpenAI-compatible server; None: the judge runs in this process.
            judge_options: Further arguments of `JudgeServer` or `JudgeModel`.
            device: Of the model in this process.
            log_folder: Where to keep a sample of pictures and answers; None: nowhere.
            log_per_call: How many of each call.

        Raises:
            ValueError: An argument is not valid.
            ImportError: An optional dependency is missing.
        """
        self.judge = load_judge(model, server, judge_options, device=device)
        self._log = None if log_folder is None else AnswerLog(log_folder, log_per_call)
        self._log_per_call = log_per_call

    def log_to(self, folder: Path) -> None:
        """Keep a sample of pictures and answers in this folder from now on, unless there is a `log_folder`."""
        self._log = self._log or AnswerLog(folder, self._log_per_call)

    def load(self) -> None:
        """Load the model or look for the server now."""
        self.judge.load()

    def unload(self) -> None:
        """Let the model or the connections go."""
        self.judge.unload()

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[NDArray[np.float64], Details]:
        """Return the share answered right, (batch,), NaN where an answer is empty, and each picture's `answers`.

        Raises:
            ValueError: A prompt's metadata has no questions, or not one answer each.
        """
        tasks = [_questions(one, prompt) for one, prompt in zip(metadata, prompts, strict=True)]
        asked = [(image, text) for image, (texts, _) in zip(images, tasks, strict=True) for text in texts]
        replies = iter(self.judge.ask([image for image, _ in asked], [text for _, text in asked]))
        answers = [tuple(next(replies) for _ in texts) for texts, _ in tasks]
        scores = np.array(
            [_share(expected, given) for (_, expected), given in zip(tasks, answers, strict=True)], np.float64
        )
        if self._log is not None:
            self._log.record(list(images), prompts, [texts for texts, _ in tasks], answers, scores.tolist())
        return scores, {"answers": answers}


def _share(expected: Sequence[str], given: Sequence[str]) -> float:
    if not all(answer.strip() for answer in given):
        return float("nan")
    return float(np.mean([answers_match(*pair) for pair in zip(expected, given, strict=True)]))


def _questions(metadata: Mapping[str, Any], prompt: str) -> tuple[list[str], list[str]]:
    """Read and check what a prompt's metadata asks."""
    questions, answers = metadata.get("questions", ()), metadata.get("answers", ())
    if isinstance(questions, str) or isinstance(answers, str) or not questions or len(questions) != len(answers):
        raise ValueError(
            f"reward vlm_vqa needs metadata with questions and as many answers, as the prompt set counting has; "
            f"prompt {prompt!r} has {dict(metadata)}"
        )
    return [str(question) for question in questions], [str(answer) for answer in answers]


def _words(text: str) -> list[str]:
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return [_canonical(word) for word in words if word not in ("a", "an", "the")]


@functools.lru_cache(maxsize=65536)
def _canonical(word: str) -> str:
    if word in _DIGITS or word.isdigit():
        return _DIGITS.get(word, word)
    return str(_grammar().singular_noun(word) or word)


@functools.cache
def _grammar() -> inflect.engine:
    import inflect  # here, because it takes longer to import than the rest of the package

    return inflect.engine()
