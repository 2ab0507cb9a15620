"""Files with random content: a reader returns something valid or raises an error of its own, and never hangs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agents import TrainConfig
from ddpo_env.prompts import load_prompts
from ddpo_env.prompts.distributions import PromptSet
from rewards import parse_options

QUICK = settings(
    max_examples=100,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=3)
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
FILES = (".txt", ".jsonl", ".json", ".csv", ".tsv", "")


def read(folder: Path, content: bytes) -> TrainConfig | None:
    (folder / "config.yaml").write_bytes(content)
    config = read_or_refused(lambda: TrainConfig.read(folder), "config.yaml")
    assert config is None or isinstance(config, TrainConfig)
    return config


def read_or_refused(reading: Callable[[], Any], name: str) -> Any:
    """Return what was read, or `None` after an error that has the name in it."""
    try:
        return reading()
    except (ValueError, TypeError) as error:
        message = str(error)
    assert name in message
    return None


@QUICK
@given(content=st.binary(max_size=300))
@example(content=b"model: tiny\nmodel: tiny\n")
@example(content=b"\xff\xfem\x00o\x00d\x00e\x00l\x00")
@example(content=b"- " * 5000)
@example(content=b"{" * 5000)
def test_bytes_as_settings_are_refused(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content) is None


@QUICK
@given(value=VALUES)
def test_any_document_is_no_settings(tmp_path: Path, value: Any) -> None:
    assert read(tmp_path, yaml.safe_dump(value).encode()) is None


@QUICK
@given(data=st.data())
def test_an_edited_setting_is_valid_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    values: dict[str, Any] = TrainConfig().as_dict()
    owner = data.draw(st.sampled_from([values, *(one for one in values.values() if isinstance(one, dict))]))
    name = data.draw(st.sampled_from(sorted(owner)))
    owner[name] = data.draw(VALUES)
    config = read(tmp_path, yaml.safe_dump(values).encode())
    if config is not None:
        assert read(tmp_path, yaml.safe_dump(config.as_dict()).encode()) == config


@QUICK
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
@pytest.mark.parametrize("suffix", FILES)
def test_a_prompt_file_is_read_or_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content)
    prompts = read_or_refused(lambda: load_prompts(str(path)), path.name)
    assert prompts is None or isinstance(prompts, PromptSet)
    assert all(prompt.strip() and "\0" not in prompt for prompt, _ in prompts or ())


@QUICK
@given(pairs=st.lists(st.text(max_size=30), max_size=3))
@example(pairs=["a" + ".b" * 20_000 + "=1"])
@example(pairs=["a=" + "[" * 20_000])
@example(pairs=["=", "a=", "a..b=1", "a=1", "a=2"])
def test_reward_options_are_read_or_refused(pairs: list[str]) -> None:
    options = read_or_refused(lambda: parse_options(pairs), "reward_options")
    assert options is None or isinstance(options, dict)
