"""Prompt files of every format, and prompts out of other libraries' containers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ddpo_env.prompts import PromptSet, load_prompts

FILES: list[tuple[str, str, list[Any]]] = [
    (
        "metadata.jsonl",
        '{"tag": "colors", "prompt": "a photo of a red dog"}\n\n{"tag": "count", "prompt": "two cats"}\n',
        [("a photo of a red dog", {"tag": "colors"}), ("two cats", {"tag": "count"})],
    ),
    ("strings.jsonl", '"a cat"\n"a dog"\n', [("a cat", {}), ("a dog", {})]),
    ("list.json", '[\n  "a cat",\n  {"text": "a dog", "n": 2}\n]\n', [("a cat", {}), ("a dog", {"n": 2})]),
    ("object.json", '{"prompts": ["a cat"], "version": 3}', [("a cat", {})]),
    ("quoted.csv", 'prompt,category\n"a cat, sitting",animals\n', [("a cat, sitting", {"category": "animals"})]),
    ("parti.tsv", "Prompt\tCategory\na cat\tAnimals\n", [("a cat", {"Category": "Animals"})]),
    ("windows.txt", "\ufeffa cat\r\n# a comment\r\na dog\r\n", [("a cat", {}), ("a dog", {})]),
    ("brackets.txt", "[red] fox [8k]\n(a cat:1.3)\n", [("[red] fox [8k]", {}), ("(a cat:1.3)", {})]),
    ("separator.jsonl", '{"prompt": "a cat\u2028"}\n', [("a cat\u2028", {})]),
]
REFUSED: list[tuple[str, bytes, str]] = [
    ("lines.txt", b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "holds JSON: name the file .jsonl"),
    ("later.txt", b'# colours\na cat\n{"prompt": "a dog"}\n', "line 3: a prompt must be plain text; it holds JSON"),
    ("form_feed.txt", b"a cat\x0ca dog\n", "line 1 must be text without control characters"),
    ("twice.csv", b"prompt,prompt\na cat,a dog\n", "must name each column once; it has prompt, prompt"),
    ("twice.jsonl", b'{"prompt": "a cat", "prompt": "a dog"}\n', "line 1 must be JSON; an object has a key twice"),
    ("huge.jsonl", b'{"prompt": "a cat", "x": 1e999}\n', "line 1 must be JSON; a number must be finite; got 1e999"),
    ("nan.json", b'[{"prompt": "a cat", "x": NaN}]', "a number must be finite; got NaN"),
    ("deep.jsonl", b'{"prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}", "metadata that copy.deepcopy can copy"),
    ("list.txt", b'[\n  "a cat",\n  "a dog"\n]\n', "holds JSON: name it .json"),
    ("none.jsonl", b'{"tag": "colors"}\n', "line 1 must have an entry prompt or text or caption; it has tag"),
    ("broken.jsonl", b'"a cat"\n{"prompt": \n', "line 2 must be JSON"),
    ("number.json", b"[1, 2]", "entry 1 must be a string"),
    ("object.json", b'{"a": 1}', "must hold a JSON list of prompts"),
    ("deep.json", b"[" * 100_000, "it is nested too deeply"),
    ("headless.csv", b"a cat,animals\na dog,animals\n", "must begin with the names of its columns"),
    ("ragged.csv", b"prompt,tag\na cat\n", "row 2 must have 2 columns; it has 1"),
    ("empty.csv", b"", "must begin with the names of its columns"),
    ("table.parquet", b"PAR1", "must be a file that ends in .txt, .jsonl, .json, .csv, .tsv"),
    ("wide.txt", "a cat".encode("utf-16"), "must be UTF-8 text"),
    ("null.txt", b"a cat\0\n", "line 1 must be text without control characters"),
    ("escape.txt", b"a \x1b[31mcat\n", "line 1 must be text without control characters"),
    ("long.txt", b"a" * 1_000_000, "line 1 must have at most 10000 characters; got 1000000"),
]


@pytest.mark.parametrize(("name", "text", "expected"), FILES, ids=[name for name, _, _ in FILES])
def test_file_is_read_as_what_it_is(tmp_path: Path, name: str, text: str, expected: list[Any]) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    prompts = load_prompts(path)
    assert isinstance(prompts, PromptSet)
    assert list(prompts) == expected


@pytest.mark.parametrize(("name", "content", "message"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((ValueError, TypeError)) as caught:
        load_prompts(path)
    assert name in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "prompts",
    [
        ["a cat", "a dog"],
        np.array(["a cat", "a dog"]),
        np.array(["a cat", "a dog"], dtype=object),
        pd.Series(["a cat", "a dog"]),
        pd.Index(["a cat", "a dog"]),
        dict.fromkeys(["a cat", "a dog"]).keys(),
        (prompt for prompt in ("a cat", "a dog")),
        [{"prompt": "a cat"}, {"prompt": "a dog"}],
    ],
    ids=["list", "array", "objects", "series", "index", "keys", "generator", "records"],
)
def test_any_finite_iterable_is_a_set(prompts: Any) -> None:
    loaded = load_prompts(prompts)
    assert isinstance(loaded, PromptSet)
    assert [(type(prompt), prompt) for prompt, _ in loaded] == [(str, "a cat"), (str, "a dog")]


@pytest.mark.parametrize(
    "prompts", [pd.DataFrame({"prompt": ["a cat"]}), np.array([["a cat"]]), {"a cat": 1}, b"a cat", 5, None]
)
def test_other_containers_are_refused(prompts: Any) -> None:
    with pytest.raises(TypeError, match="prompts must be the name of a set, a path, prompts in one dimension"):
        load_prompts(prompts)


@pytest.mark.parametrize("function", [lambda: "a cat", lambda rng, other: "a cat", lambda *, rng: "a cat"])
def test_function_that_takes_no_generator_is_refused_at_once(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="the function prompts must take one argument, a numpy.random.Generator"):
        load_prompts(function)


async def later(rng: np.random.Generator) -> str:
    return "a cat"


def one_by_one(rng: np.random.Generator) -> Any:
    yield "a cat"


@pytest.mark.parametrize("function", [later, one_by_one])
def test_function_that_returns_no_prompt_at_once_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="the function prompts must be a plain function that returns a prompt"):
        load_prompts(function)


def test_prompts_keep_no_reference_to_what_they_were_given() -> None:
    metadata = {"answers": ["two"]}
    prompts = load_prompts([("two cats", metadata)])
    metadata["answers"].clear()
    assert isinstance(prompts, PromptSet)
    assert list(prompts) == [("two cats", {"answers": ["two"]})]
