"""Prompt distributions, the first stop of the data's path: every episode begins with a prompt.

A distribution is anything with `sample(rng) -> (prompt, metadata)`; `load_prompts` makes one from the name of a set, a
text file, a list or a function. The named sets are those of DDPO (arXiv 2305.13301, section 5 and appendix) and the
bundled model's held-out words.
"""

from __future__ import annotations

import copy
import inspect
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from ddpo_env.prompts import vocabulary
from ddpo_env.prompts.files import read_prompt_file, split_prompt
from rewards.registry import did_you_mean, is_deferred

if TYPE_CHECKING:
    import inflect

Prompt: TypeAlias = tuple[str, dict[str, Any]]
"""A prompt and its metadata for the reward, such as questions and answers."""

PromptFunctionLike: TypeAlias = Callable[[np.random.Generator], str | tuple[str, Mapping[str, Any]]]
PromptSource: TypeAlias = (
    "str | Path | Iterable[str | tuple[str, Mapping[str, Any]] | Mapping[str, Any]] | PromptFunctionLike"
)

_LONGEST = 10_000
"""Characters of a prompt. Text encoders read at most a few thousand tokens."""
_MOST = 1_000_000
"""Prompts of a set."""


@runtime_checkable
class PromptDistribution(Protocol):
    """Where the prompts of episodes come from."""

    def sample(self, rng: np.random.Generator) -> Prompt:
        """Return a prompt and its metadata; all randomness must come from `rng`."""
        ...


@dataclass(frozen=True)
class PromptSet:
    """The uniform distribution over a finite sequence of prompts; a prompt that occurs twice is twice as likely.

    Attributes:
        prompts: The prompts, none empty.
        metadata: One dictionary per prompt, or empty if no prompt has metadata.
    """

    prompts: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts must hold at least one prompt; got none")
        if self.metadata and len(self.metadata) != len(self.prompts):
            raise ValueError(f"metadata must hold {len(self.prompts)} dictionaries; got {len(self.metadata)}")

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index], dict(self.metadata[index]) if self.metadata else {}

    def sample(self, rng: np.random.Generator) -> Prompt:
        """Return a prompt and a copy of its metadata."""
        return self[int(rng.integers(len(self)))]


@dataclass(frozen=True)
class PromptFunction:
    """The distribution of a user's function `(rng) -> prompt` or `(rng) -> (prompt, metadata)`."""

    function: PromptFunctionLike

    def sample(self, rng: np.random.Generator) -> Prompt:
        """Call the function; a result that is not a prompt is an error that names the function."""
        return _checked(self.function(rng), f"prompt function {getattr(self.function, '__name__', self.function)!s}")


def load_prompts(prompts: PromptSource | PromptDistribution) -> PromptDistribution:
    """Return the prompt distribution that the argument describes.

    Args:
        prompts: One of
            the name of a set in `PROMPT_SETS`, which wins over a file of the same name;
            the path of a file: `.txt` (or no suffix) with one prompt per line, in which lines that start with `#` are
            comments; `.jsonl` or `.json` with strings or objects; `.csv` or `.tsv` with a header. Of objects and rows
            the entry `prompt` (or `text`, `caption`) is the prompt, and the others are metadata;
            strings, pairs `(string, metadata)` or objects as above, in a list, an array, a pandas Series, a column of a
            dataset or any other finite iterable;
            a function `(numpy.random.Generator) -> string` or `-> (string, metadata)`;
            a distribution, which is returned as it is.

    Raises:
        ValueError: No such set or file, no prompts in it, or a prompt that is empty, has control characters or more
            than 10,000 characters (the file and line are named).
        TypeError: The argument, or a prompt, has another type; or a function does not take a generator.
    """
    if isinstance(prompts, str) and prompts in PROMPT_SETS:
        return PROMPT_SETS[prompts]()
    if isinstance(prompts, str | Path):
        return _read_file(prompts)
    if isinstance(prompts, PromptSet):
        return prompts
    # Arrays and tables have a method `sample` too; what has a length and items is a sequence.
    is_sequence = isinstance(prompts, Sized) and hasattr(prompts, "__getitem__")
    if isinstance(prompts, PromptDistribution) and not is_sequence:
        _check_signature(prompts.sample, "the method sample of prompts")
        return prompts
    if callable(prompts):
        _check_signature(prompts, "the function prompts")
        return PromptFunction(prompts)
    is_flat = not isinstance(prompts, Mapping | bytes) and getattr(prompts, "ndim", 1) == 1
    if isinstance(prompts, Iterable) and is_flat:
        entries = list(islice(prompts, _MOST + 1))
        if len(entries) > _MOST:
            raise ValueError(f"prompts must hold at most {_MOST} prompts; got more")
        return _collect(_checked(prompt, f"prompts[{index}]") for index, prompt in enumerate(entries))
    raise TypeError(
        "prompts must be the name of a set, a path, prompts in one dimension, a function or a distribution; got "
        f"{type(prompts).__name__} {reprlib.repr(prompts)}"
    )


def _check_signature(function: Callable[..., Any], name: str) -> None:
    """Refuse a function that cannot be called with a random generator alone, or that returns no prompt at once.

    Raises:
        TypeError: Its signature does not take one argument, or it is async or a generator.
    """
    if is_deferred(function) or is_deferred(type(function).__call__):
        raise TypeError(f"{name} must be a plain function that returns a prompt; it is async or a generator")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise TypeError(
            f"{name} must take one argument, a numpy.random.Generator from which all its randomness comes: {error}"
        ) from error
    except ValueError:
        pass  # a function written in C may have no signature


def _collect(prompts: Iterable[Prompt]) -> PromptSet:
    pairs = tuple(prompts)
    metadata = tuple(metadata for _, metadata in pairs)
    return PromptSet(tuple(prompt for prompt, _ in pairs), metadata if any(metadata) else ())


def _checked(prompt: object, where: str) -> Prompt:
    """Bring a string, a `(string, metadata)` pair or an object with an entry `prompt` into one form."""
    metadata: object = {}
    if isinstance(prompt, Mapping):
        prompt, metadata = split_prompt(prompt, where)
    elif isinstance(prompt, tuple) and len(prompt) == 2:
        prompt, metadata = prompt
    if not isinstance(prompt, str) or not isinstance(metadata, Mapping):
        raise TypeError(
            f"{where} must be a string or a pair (string, dictionary); got {reprlib.repr(prompt)} and "
            f"{reprlib.repr(metadata)}"
        )
    if not prompt.strip():
        raise ValueError(f"{where} must not be empty; got {prompt!r}")
    if len(prompt) > _LONGEST:
        raise ValueError(f"{where} must have at most {_LONGEST} characters; got {len(prompt)}: {prompt[:30]!r}...")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n" for letter in prompt):
        raise ValueError(f"{where} must be text without control characters; got {reprlib.repr(prompt)}")
    try:
        return str(prompt), copy.deepcopy(dict(metadata))  # every reward gets a copy
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{where} must have metadata that copy.deepcopy can copy; {error}") from error


def _read_file(path: str | Path) -> PromptSet:
    try:
        is_file = Path(path).is_file()
    except (OSError, ValueError):  # a text that can be no path
        is_file = False
    if not is_file:
        raise ValueError(
            f"prompts must be one of {', '.join(PROMPT_SETS)}, or an existing text file; got {reprlib.repr(str(path))}"
            f"{did_you_mean(path, PROMPT_SETS)}"
        )
    return _collect(_checked(prompt, where) for where, prompt in read_prompt_file(Path(path)))


def _grammar() -> inflect.engine:
    import inflect  # imported here because that takes longer than the rest of the package

    return inflect.engine()


def _with_article(nouns: Iterable[str]) -> PromptSet:
    """`a cat`, `an ant`."""
    grammar = _grammar()
    return PromptSet(tuple(str(grammar.a(noun)) for noun in nouns))


def _activities(animals: Iterable[str], activities: Iterable[str]) -> PromptSet:
    """`a cat riding a bike`, for every animal and every activity."""
    pairs = product(_with_article(animals).prompts, activities)
    return PromptSet(tuple(f"{animal} {activity}" for animal, activity in pairs))


def _counting() -> PromptSet:
    """`two dogs`, with questions for a vision-language model about the image."""
    grammar = _grammar()
    questions = ("How many animals are in this image?", "What animals are in this image?")
    return _collect(
        (f"{count} {plural}", {"questions": questions, "answers": (count, plural)})
        for plural in (str(grammar.plural(animal)) for animal in vocabulary.SIMPLE_ANIMALS)
        for count in vocabulary.COUNTS
    )


PROMPT_SETS: dict[str, Callable[[], PromptSet]] = {
    "simple_animals": lambda: _with_article(vocabulary.SIMPLE_ANIMALS),
    "animal_activities": lambda: _activities(vocabulary.SIMPLE_ANIMALS, vocabulary.ACTIVITIES),
    "counting": _counting,
    "held_out_animals": lambda: _with_article(vocabulary.HELD_OUT_ANIMALS),
    "everyday_objects": lambda: _with_article(vocabulary.EVERYDAY_OBJECTS),
    "activities_of_held_out_animals": lambda: _activities(vocabulary.HELD_OUT_ANIMALS, vocabulary.ACTIVITIES),
    "held_out_activities": lambda: _activities(vocabulary.SIMPLE_ANIMALS, vocabulary.HELD_OUT_ACTIVITIES),
    "held_out_activities_of_held_out_animals": lambda: _activities(
        vocabulary.HELD_OUT_ANIMALS, vocabulary.HELD_OUT_ACTIVITIES
    ),
    "imagenet_animals": lambda: _with_article(vocabulary.read_words("imagenet_animals")),
}
"""Named prompt sets; each one is built when it is used."""
