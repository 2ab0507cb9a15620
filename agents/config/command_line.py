"""Command lines that take every setting of a run, on top of a preset or a file of settings: that of `ddpo-train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tyro

from agents.config.config_file import read_plain_yaml
from agents.config.presets import PRESETS, preset_config
from agents.config.train_config import TrainConfig
from agents.output.terminal import print_error, quoted


@dataclass(frozen=True, kw_only=True)
class SettingsLine(TrainConfig):
    """A command line with the settings of a run; a command derives from it and adds its own arguments."""

    settings_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """The config.yaml of a run, a race or the doctor, or its folder: its settings are the defaults here, but for the
    run's folder. Code, servers, environment variables and paths outside the file's folder are used only if they are
    named again."""

    @property
    def config(self) -> TrainConfig:
        """The settings alone, with a note of which ones were given."""
        return TrainConfig(**_settings(self)).with_given(self._given).with_tuning(self._tuning)


@dataclass(frozen=True, kw_only=True)
class CommandLine(SettingsLine):
    """What a user of `ddpo-train` asked for: the settings of a run, and whether to run it."""

    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the settings, print the plan and stop; nothing is loaded, downloaded or written."""


_Line = TypeVar("_Line", bound=SettingsLine)


@dataclass(kw_only=True)
class _Defaults:
    """The arguments that set the defaults of the others."""

    preset: str | None = None
    config: Path | None = None


def parse_command_line(args: Sequence[str] | None = None, description: str | None = None) -> CommandLine:
    """Parse the command line of `ddpo-train`; see `parse_settings_line`."""
    return parse_settings_line(CommandLine, args, description)


def parse_settings_line(
    command: type[_Line], args: Sequence[str] | None = None, description: str | None = None
) -> _Line:
    """Parse a command line with the settings of a run; they override those of a preset or a file, in any order.

    Args:
        command: what is parsed.
        args: default: the program's arguments.
        description: text of `--help`.

    Raises:
        SystemExit: after `--help`, and after an error, which is printed.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    known = _defaults_in(arguments)
    try:
        _refuse_empty(arguments)
        settings = _default_config(known)
        default = command(**_settings(settings))
        kind: Any = Annotated[command, tyro.conf.OmitArgPrefixes]
        line = tyro.cli(kind, args=arguments, description=description, default=default)
        given = {flag.removeprefix("no_") for flag in flags_in(arguments)} & line.flat().keys()
        if known.config is not None:
            _check_named_again(line, given, known.config)
    except ValueError as error:
        print_error(error)
        raise SystemExit(2) from error
    return cast(_Line, line.with_given(given).with_tuning(settings._tuning.without(given)))


def _default_config(known: _Defaults) -> TrainConfig:
    """Return the settings of a preset or of a file; without both, the defaults.

    Raises:
        ValueError: for both, or a file that does not hold the settings of a run.
    """
    if known.config is None:
        return preset_config(known.preset) if known.preset in PRESETS else TrainConfig()
    if known.preset is not None:
        raise ValueError(f"preset must not be given with config, which has all settings; got {known.preset!r}")
    try:
        config = TrainConfig.from_dict(read_plain_yaml(known.config))
    except (OSError, ValueError) as error:
        raise ValueError(f"config: {str(known.config)!r} does not hold the settings of a run: {error}") from error
    open_again = {name: None for name in config.flat() if name.endswith("_sha256")}  # a new run takes what is there now
    if config.optimizer.schedule_iterations == config.iterations:
        open_again["schedule_iterations"] = None
    return config.changed(run_dir=None, resume=None, **open_again)


def _check_named_again(config: TrainConfig, given: set[str], path: Path) -> None:
    """Refuse a file of settings that alone would choose what runs or what is reached."""
    from agents.config.authority import reaching_out, setting_flags  # they import torch

    if needed := [name for name in reaching_out(config, path.parent.resolve()) if name not in given]:
        raise ValueError(
            f"config: {str(path)!r} uses code, a server, an environment variable or a path outside its folder "
            f"({', '.join(needed)}), and a file alone must not choose these. If you trust it, name them again by "
            f"adding:\n  {quoted(*setting_flags(config, needed))}"
        )


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(TrainConfig)}


def flags_in(arguments: Sequence[str]) -> list[str]:
    """Return the names of the flags, `--lora-rank=2` as `lora_rank`; no value begins with two hyphens."""
    return [one[2:].partition("=")[0].replace("-", "_") for one in arguments if one.startswith("--")]


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty value, which as a path would be the working directory."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        is_empty = not argument.strip() or (flag.startswith("--") and equals and not value.strip())
        if is_empty:
            before = next((one for one in reversed(arguments[: index + 1]) if one.startswith("--")), "an argument")
            raise ValueError(f"{before.partition('=')[0]} must not be empty; got {value or argument!r}")


def _defaults_in(args: Sequence[str]) -> _Defaults:
    """Return the preset or file that is named; none for a wrong one, which the whole command line will show."""
    try:
        known, _ = tyro.cli(_Defaults, args=args, return_unknown_args=True, add_help=False, console_outputs=False)
    except SystemExit:
        return _Defaults()
    if known.config is not None and known.config.is_dir():
        known.config /= "config.yaml"
    return known
