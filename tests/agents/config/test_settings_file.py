"""`--config`: the settings of a file are the defaults of a command line, and a file alone reaches nothing."""

import shlex
from pathlib import Path

import pytest
import yaml

from agents.config.command_line import parse_command_line
from agents.config.resolve import resolve
from agents.config.train_config import TrainConfig, train_config


def write_settings(folder: Path, **settings: object) -> tuple[Path, TrainConfig]:
    """Write a file as a run does; return its path and its settings."""
    config = resolve(train_config(run_dir=folder / "run", **settings))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
    return path, config


def test_settings_of_the_file_are_the_defaults_of_the_command_line(tmp_path: Path) -> None:
    path, own = write_settings(tmp_path, algorithm="nft", lora_rank=2, iterations=7, vae_tiling=True)
    line = parse_command_line(["--lora-rank=3", f"--config={path}", "--no-vae-tiling"]).config
    assert line.run_dir is None
    assert resolve(line.changed(run_dir=own.run_dir)).flat() == own.flat() | {"lora_rank": 3, "vae_tiling": False}
    longer = resolve(parse_command_line([f"--config={path}", "--iterations=9"]).config)
    assert longer.schedule_length == 9


def test_folder_stands_for_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, own = write_settings(tmp_path, lora_rank=2, iterations=7, reward="my.module:Reward")
    arguments = [f"--config={path.parent}", "--reward=my.module:Reward"]
    assert resolve(parse_command_line(arguments).config.changed(run_dir=own.run_dir)).flat() == own.flat()
    with pytest.raises(SystemExit):
        parse_command_line(arguments[:1])
    assert "config.yaml' uses code" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(SystemExit):
        parse_command_line(arguments)
    assert "config.yaml' does not hold the settings of a run: [Errno 2]" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("[1]", [], "does not hold the settings of a run"),
        ("model: tiny\nlerning_rate: 1", [], "did you mean learning_rate"),
        (None, ["--preset=tiny-aesthetic"], "preset must not be given with config"),
    ],
)
def test_wrong_file_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, arguments: list[str], message: str
) -> None:
    path, _ = write_settings(tmp_path)
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        parse_command_line([f"--config={path}", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_reaches_out_must_be_named_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = write_settings(tmp_path, reward="my.module:Reward", reward_options=("path=a b",))
    with pytest.raises(SystemExit):
        parse_command_line([f"--config={path}"])
    added = shlex.split(capsys.readouterr().err.splitlines()[1])
    assert parse_command_line([f"--config={path}", *added]).config.reward == "my.module:Reward"
