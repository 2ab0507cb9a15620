"""Commands of the documentation are tried without their work: a training's dry run, and every other one's parser."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tyro

from helpers.paths import ROOT

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
_OPTIONS_WITH_FILES = ("-c", "-r")
_DRY_RUNS: set[tuple[str, ...]] = set()
"""Arguments that a training has accepted: several pages show the same command, and a dry run takes a second."""


class UnknownProgramError(ValueError):
    """A program that is not ours, so nothing here can parse its arguments."""


class _ParsedError(BaseException):
    """The parser has accepted the arguments; no `except Exception` of a command may hide it."""


def try_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Try a command as far as that is possible without its work.

    Args:
        words: the command and its arguments.
        monkeypatch: restores what is replaced on the way.

    Returns:
        "dry run" or "parsed".

    Raises:
        UnknownProgramError: if the program is not one of ours.
        AssertionError: if the command would refuse its arguments.
        SystemExit: from its parser.
    """
    while "=" in words[0]:
        words = words[1:]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "torchrun":
        from torch.distributed.run import parse_args

        launched = parse_args(arguments)
        return try_command([launched.training_script, *launched.training_script_args], monkeypatch)
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(arguments[1:])
        return try_command([launched.training_script, *launched.training_script_args], monkeypatch)
    if program in ("python", "python3") and arguments[0].endswith(".py"):
        return try_command(arguments, monkeypatch)
    if program in ("python", "python3") and arguments[:2] == ["-m", "venv"]:
        return "parsed"
    if program in ("pip", "pytest"):
        (_check_pip if program == "pip" else _check_pytest)(arguments)
        return "parsed"
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    if program in _PROJECT["scripts"]:
        module, _, name = _PROJECT["scripts"][program].partition(":")
        return _run(getattr(importlib.import_module(module), name), program == "ddpo-train", monkeypatch)
    if program.startswith("scripts/"):
        script = ROOT / program
        monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
        main = lambda: sys.exit(runpy.run_path(str(script), run_name="__main__") and 0)  # noqa: E731
        return _run(main, program == "scripts/train_ppo.py", monkeypatch)
    raise UnknownProgramError(f"{program} is no command of this project")


def _run(main: Callable[[], int | None], trains: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a command's dry run, or the command until it has parsed its arguments."""
    dry = trains and not any(word.startswith("--resume") for word in sys.argv)
    if dry and "--dry-run" not in sys.argv:
        sys.argv.append("--dry-run")
    asked = tuple(sys.argv[1:])
    if dry and asked in _DRY_RUNS:
        return "dry run"
    with monkeypatch.context() as patch:
        for figures in ("flops.estimate_time", "weights.describe_weights"):  # they take longer than all that is checked
            patch.setattr(f"agents.planning.{figures}", lambda *_: "")
        if not dry:
            patch.setattr(tyro, "cli", _stopping(tyro.cli))
            patch.setattr(argparse.ArgumentParser, "parse_args", _stopping(argparse.ArgumentParser.parse_args))
        try:
            code = main()
        except _ParsedError:
            return "parsed"
        except SystemExit as stop:
            code = stop.code  # type: ignore[assignment]  # an int or None, as the commands have it
    assert not code, f"{' '.join(sys.argv)} ended with {code}"
    assert dry or "--help" in sys.argv, f"{' '.join(sys.argv)} did its work, or has no parser"
    _DRY_RUNS.add(asked)
    return "dry run"


def _stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Return a parser that ends the command after it has parsed the whole command line."""

    def parse_and_stop(*args: Any, **kwargs: Any) -> Any:
        parsed = parse(*args, **kwargs)
        if kwargs.get("return_unknown_args"):
            return parsed
        raise _ParsedError

    return parse_and_stop


def _check_pip(arguments: list[str]) -> None:
    """Check that files exist, and that extras are those of this project."""
    assert arguments[0] == "install"
    for flag, value in pairwise(arguments):
        assert flag not in _OPTIONS_WITH_FILES or (ROOT / value).is_file(), value
    for word in arguments:
        if extras := re.fullmatch(r"(?:\.|ddpo-env)\[(.+)\]", word):
            assert set(extras[1].split(",")) <= _PROJECT["optional-dependencies"].keys(), word


def _check_pytest(arguments: list[str]) -> None:
    """Check that the named files and folders of tests exist."""
    assert [word for word in arguments if word.startswith("tests/") and not Path(ROOT / word).exists()] == []
