"""Wrong values of every setting, made from the annotations: from Python, from a file, and on the command line."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.wrong_values import settings_of, shown, unclear, wrong_texts, wrong_values

from agents import TrainConfig, train_config
from agents.distributed import Processes
from agents.training import command
from agents.training.preparation import check_run

SETTINGS = settings_of(TrainConfig)
IN_PYTHON = [(name, value) for name, hint in SETTINGS.items() for value in wrong_values(hint)]
IN_A_FILE = [(name, value) for name, value in IN_PYTHON if type(value) is not object and not isinstance(value, bytes)]
ON_THE_COMMAND_LINE = [(name, text) for name, hint in SETTINGS.items() for text in wrong_texts(hint)]


def mostly_slow(cases: list[tuple[str, Any]]) -> list[Any]:
    """Return all cases; each ninth one runs in the quick suite too."""
    return [
        pytest.param(*case, marks=[pytest.mark.slow] if index % 9 else [], id=shown(case))
        for index, case in enumerate(cases)
    ]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "value"), mostly_slow(IN_PYTHON))
def test_wrong_settings_are_refused_in_python(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        check_run(train_config(**{name: value}), Processes())
    assert not (lacking := unclear(str(caught.value), name, value)), f"{lacking}: {caught.value}"


@pytest.mark.parametrize(("name", "value"), mostly_slow(IN_A_FILE))
def test_wrong_settings_are_refused_in_a_file(name: str, value: Any) -> None:
    settings = TrainConfig().as_dict()
    owner = next((one for one in settings.values() if isinstance(one, dict) and name in one), settings)
    owner[name] = value
    folder = Path("run")
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.dump(settings), encoding="utf-8")
    if value is None and TrainConfig().as_dict() == settings:
        pytest.skip("the default")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        TrainConfig.read(folder)
    assert "config.yaml" in str(caught.value)
    assert name in str(caught.value) or "line " in str(caught.value)  # a line for what is no plain value


@pytest.mark.parametrize(("name", "text"), mostly_slow(ON_THE_COMMAND_LINE))
def test_wrong_settings_are_refused_on_the_command_line(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option = f"--{name.replace('_', '-')}"
    monkeypatch.setattr(sys, "argv", ["ddpo-train", "--dry-run", f"{option}={text}"])
    try:
        code = command.main()
    except SystemExit as leaving:
        code = leaving.code
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert code == 2, printed
    assert not (lacking := unclear(printed, name, text)), f"{lacking}: {printed}"
    assert not list(Path().iterdir())
