"""Visual question answering: the fraction of the questions in a prompt's metadata that the judge answers correctly.

The DDPO authors' code scores counting prompts ("two dogs") like this. It looks for the expected answer anywhere in the
text, so that it finds "one" in "none". Here the expected answer must occur as whole words.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rewards.judge.judge_reward import JudgeReward
from rewards.protocol import Details, Images, Metadata

if TYPE_CHECKING:
    import inflect

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def answers_match(expected: str, answer: str) -> bool:
    """Whether the expected answer occurs in the given one.

    Both are split into words, without case, punctuation and articles. Numbers up to twenty are equal in letters and in
    digits, and nouns are equal in singular and plural (another question asks for the number). The words of the expected
    answer must then occur in the given one, next to each other and in the same order. Negation is not understood:
    "no dogs" contains "dogs".
    """
    wanted, given = _words(expected), _words(answer)
    starts = range(len(given) - len(wanted) + 1)
    return bool(wanted) and any(given[start : start + len(wanted)] == wanted for start in starts)


class VlmVqa(JudgeReward):
    """The fraction of the metadata's `questions` that a judge answers with the words of the metadata's `answers`."""

    __name__ = "vlm_vqa"

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise a `ValueError` for a prompt whose metadata has no questions, or not one answer per question."""
        for one, prompt in zip(metadata, prompts, strict=True):
            _questions(one, prompt)

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[NDArray[np.float64], Details]:
        """Return the fraction of correct answers, (batch,), NaN where an answer is empty, and each image's `answers`.

        Raises:
            ValueError: A prompt's metadata has no questions, or not one answer per question.
        """
        tasks = [_questions(one, prompt) for one, prompt in zip(metadata, prompts, strict=True)]
        asked = [(image, text) for image, (texts, _) in zip(images, tasks, strict=True) for text in texts]
        replies = iter(self.judge.ask([image for image, _ in asked], [text for _, text in asked]))
        answers = [tuple(next(replies) for _ in texts) for texts, _ in tasks]
        pairs = zip(tasks, answers, strict=True)
        scores = np.array([_fraction_correct(expected, given) for (_, expected), given in pairs], np.float64)
        self.log.record(list(images), prompts, [texts for texts, _ in tasks], answers, scores.tolist())
        return scores, {"answers": answers}


def _fraction_correct(expected: Sequence[str], given: Sequence[str]) -> float:
    if not all(answer.strip() for answer in given):
        return float("nan")
    return float(np.mean([answers_match(*pair) for pair in zip(expected, given, strict=True)]))


def _questions(metadata: Mapping[str, Any], prompt: str) -> tuple[list[str], list[str]]:
    """Return the questions and the expected answers in a prompt's metadata."""
    questions, answers = metadata.get("questions", ()), metadata.get("answers", ())
    if isinstance(questions, str) or isinstance(answers, str) or not questions or len(questions) != len(answers):
        raise ValueError(
            f"reward vlm_vqa needs metadata with questions and as many answers, as in the prompt set counting; "
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
    import inflect  # imported here because its import takes longer than that of the rest of the package

    return inflect.engine()
