"""The command line of `ddpo-train`: every setting of a run, on top of a preset where one is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import tyro

from agents.config.presets import PRESETS, preset_config
from agents.config.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class CommandLine(TrainConfig):
    """What a user asked for: the settings of a run, and whether to run it."""

    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the settings, print the plan and stop; nothing is loaded, downloaded or written."""

    @property
    def config(self) -> TrainConfig:
        """The settings alone."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in fields(TrainConfig)})


@dataclass(kw_only=True)
class _Preset:
    """The one argument that sets the defaults of the others."""

    preset: str | None = None


def parse_command_line(args: Sequence[str] | None = None, description: str | None = None) -> CommandLine:
    """Parse the command line; its settings override the preset's, in any order.

    Args:
        args: default: the program's arguments.
        description: text of `--help`.

    Raises:
        SystemExit: after `--help`, and after an error, which is printed.
    """
    name = _preset_in(args)
    default = CommandLine() if name is None else CommandLine(**vars(preset_config(name)))
    return tyro.cli(
        Annotated[CommandLine, tyro.conf.OmitArgPrefixes], args=args, description=description, default=default
    )


def _preset_in(args: Sequence[str] | None) -> str | None:
    """Return the preset that is named; `None` for a wrong one, which the whole command line will show."""
    try:
        known, _ = tyro.cli(_Preset, args=args, return_unknown_args=True, add_help=False, console_outputs=False)
    except SystemExit:
        return None
    return known.preset if known.preset in PRESETS else None
