"""Command lines that take every setting of a run, on top of a preset where one is named: that of `ddpo-train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar, cast

import tyro

from agents.config.presets import PRESETS, preset_config
from agents.config.train_config import TrainConfig
from agents.output.terminal import print_error


@dataclass(frozen=True, kw_only=True)
class SettingsLine(TrainConfig):
    """A command line with the settings of a run; a command derives from it and adds its own arguments."""

    @property
    def config(self) -> TrainConfig:
        """The settings alone, with a note of which ones were given."""
        return TrainConfig(**_settings(self)).with_given(self._given)


@dataclass(frozen=True, kw_only=True)
class CommandLine(SettingsLine):
    """What a user of `ddpo-train` asked for: the settings of a run, and whether to run it."""

    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the settings, print the plan and stop; nothing is loaded, downloaded or written."""


_Line = TypeVar("_Line", bound=SettingsLine)


@dataclass(kw_only=True)
class _Preset:
    """The one argument that sets the defaults of the others."""

    preset: str | None = None


def parse_command_line(args: Sequence[str] | None = None, description: str | None = None) -> CommandLine:
    """Parse the command line of `ddpo-train`; see `parse_settings_line`."""
    return parse_settings_line(CommandLine, args, description)


def parse_settings_line(
    command: type[_Line], args: Sequence[str] | None = None, description: str | None = None
) -> _Line:
    """Parse a command line with the settings of a run; they override the preset's, in any order.

    Args:
        command: what is parsed.
        args: default: the program's arguments.
        description: text of `--help`.

    Raises:
        SystemExit: after `--help`, and after an error, which is printed.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    name = _preset_in(arguments)
    default = command() if name is None else command(**_settings(preset_config(name)))
    try:
        _refuse_empty(arguments)
        kind: Any = Annotated[command, tyro.conf.OmitArgPrefixes]
        line = tyro.cli(kind, args=arguments, description=description, default=default)
    except ValueError as error:
        print_error(error)
        raise SystemExit(2) from error
    given = {flag.removeprefix("no_") for flag in _flags(arguments)}
    return cast(_Line, line.with_given(given & line.flat().keys()))


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(TrainConfig)}


def _flags(arguments: Sequence[str]) -> list[str]:
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


def _preset_in(args: Sequence[str] | None) -> str | None:
    """Return the preset that is named; `None` for a wrong one, which the whole command line will show."""
    try:
        known, _ = tyro.cli(_Preset, args=args, return_unknown_args=True, add_help=False, console_outputs=False)
    except SystemExit:
        return None
    return known.preset if known.preset in PRESETS else None
