"""The command line of `scripts/train_ppo.py`: every setting of a run, on top of a preset where one is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from agents.config.presets import PRESETS, preset_config
from agents.config.train_config import TrainConfig


@dataclass(kw_only=True)
class CommandLine:
    """What a user asked for.

    `config` has no default of its own: as an instance it would show the sizes that are left open as if they were given.
    """

    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the settings, print the plan and stop: nothing is loaded, downloaded, asked or written."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(kw_only=True)
class _PresetAlone:
    """The one argument that the others' defaults depend on."""

    preset: str | None = None


def parse_command_line(args: Sequence[str] | None = None, description: str | None = None) -> CommandLine:
    """Parse the command line; what is on it wins over the preset, wherever it stands.

    Args:
        args: default: those of the program.
        description: for `--help`.

    Raises:
        SystemExit: after `--help`, and after an error, which is printed.
    """
    line = Annotated[CommandLine, tyro.conf.OmitArgPrefixes]
    name = _preset_in(args)
    if name is None:
        return tyro.cli(line, args=args, description=description)
    default = CommandLine(config=preset_config(name))
    default.config.training.epochs = 0  # left open, because they depend on the algorithm, which may be another
    return tyro.cli(line, args=args, description=description, default=default)


def _preset_in(args: Sequence[str] | None) -> str | None:
    """Return the preset that is named; none where it is wrong, which shows when the whole is parsed or checked."""
    try:
        known, _ = tyro.cli(_PresetAlone, args=args, return_unknown_args=True, add_help=False, console_outputs=False)
    except SystemExit:
        return None
    return known.preset if known.preset in PRESETS else None
