"""`config.yaml` of a run may be anybody's: every wrong edit is an error that names the setting, and nothing hangs."""

import time
from pathlib import Path

import pytest
import yaml

from agents.config.resolve import resolve
from agents.config.train_config import TrainConfig, train_config


@pytest.fixture
def lines(tmp_path: Path) -> dict[str, str]:
    """The lines of a run's file, by setting."""
    config = resolve(train_config(run_dir=tmp_path))
    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    return {line.split(":")[0].strip(): line for line in text.splitlines() if not line.lstrip().startswith("-")} | {
        "": text
    }


WRONG = [
    "[1]",
    "{a: 1}",
    "'text'",
    "!!python/object/apply:os.system [x]",
    "!!binary aGk=",
    ".nan",
    ".inf",
    "2020-01-01",
]
NUMBERS = [
    *(
        "seed",
        "learning_rate",
        "lora_rank",
        "guidance_scale",
        "epochs",
        "weight_decay",
        "eval_samples",
        "iterations",
        "clip_range",
    ),
    *("gradient_checkpointing", "critic", "kl_coef", "adam_beta1", "process_timeout", "resolution"),
]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_wrong_value_is_refused_by_name(tmp_path: Path, lines: dict[str, str], name: str) -> None:
    for value in [*WRONG, "'0'", "1e999", "-7", "9" * 5000, "yes please", "&a 1", "*a", "''"]:
        changed = lines[""].replace(lines[name], f"{lines[name].split(':')[0]}: {value}")
        assert changed != lines[""]
        (tmp_path / "config.yaml").write_text(changed)
        with pytest.raises(ValueError, match="resume: .*does not hold the settings of a run: ") as caught:
            TrainConfig.read(tmp_path)
        assert len(str(caught.value)) < 1000
        assert name in str(caught.value) or "line " in str(caught.value) or "digits" in str(caught.value), value


@pytest.mark.parametrize("name", ["model", "reward", "prompts", "algorithm", "device", "dtype", "advantage", "policy"])
@pytest.mark.parametrize("value", ["[1]", "{a: 1}", "1", "''", "true", "5.5", '"\\0"', '"\\ud800"'])
def test_names_must_be_text(tmp_path: Path, lines: dict[str, str], name: str, value: str) -> None:
    (tmp_path / "config.yaml").write_text(
        lines[""].replace(f"\n{lines[name]}", f"\n{lines[name].split(':')[0]}: {value}")
    )
    text = lines[""]
    if text.startswith(lines[name]):
        pytest.skip("the first line")
    with pytest.raises(ValueError, match=r"config.yaml' does not hold the settings of a run"):
        TrainConfig.read(tmp_path)


@pytest.mark.parametrize("name", ["learning_rate", "seed", "advantage", "lora_rank", "model"])
def test_null_and_missing_lines_are_not_filled_in(tmp_path: Path, lines: dict[str, str], name: str) -> None:
    null = f"{lines[name].split(':')[0]}: null"
    for replacement in (f"\n{null}\n", "\n"):
        (tmp_path / "config.yaml").write_text(lines[""].replace(f"\n{lines[name]}\n", replacement))
        with pytest.raises(ValueError, match=rf"{name}|no settings of a run"):
            resolve(train_config(resume=tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: *a\n", "aliases and anchors are not valid"),
        ("a: &a [x]\n" + "".join(f"{chr(98 + i)}: [*a, *a]\n" for i in range(9)), "aliases and anchors"),
        ("[" * 100_000, "nested at most 4 levels"),
        ("a: " * 3 + "1", "mapping values are not allowed"),
        ("seed: 1\nseed: 2\n", "line 2: 'seed' must occur once"),
        ("1: 2\n", "line 1: names must be text, in quotes if they look like a number or yes; got '1'"),
        ("<<: {model: x}\n", "names must be text"),
        ("model: tiny\nseed: 0\nrun: {seed: 0}\n", "seed must occur once"),
        ("model: tiny\nrun: 5\n", "run must be a group of settings; got 5"),
        ("model: tiny\nfoo: {seed: 0}\n", "there is no group of settings .foo."),
        ("model: tiny\ncolour: blue\n", "there is no setting 'colour'"),
        ("model: tiny\npreset: of-nobody\n", "must hold every setting"),
        ("model: " + "x" * 2_000_000, "at most 1,000,000 bytes"),
        ("--- a\n--- b\n", "expected a single document"),
        ("a: !!python/name:os.system\n", "tags are not valid"),
    ],
)
def test_hostile_files_are_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(ValueError, match=message):
        TrainConfig.read(tmp_path)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00\x01\x02", "reward: caf\xe9".encode("latin-1")])
def test_binary_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"resume: .*does not hold the settings"):
        TrainConfig.read(tmp_path)


def test_own_file_of_any_language_is_read(tmp_path: Path) -> None:
    config = resolve(train_config(run_dir=tmp_path / "猫", reward_options=("template=ε {prompt}",)))
    text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert TrainConfig.read(tmp_path) == config
