"""The command line that gives settings: how a run is done again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from agents.config.presets import preset_config
from agents.config.resolve import unused_settings
from agents.config.train_config import TrainConfig
from agents.output.terminal import quoted

_SUPPRESSED = ("unconditional_gradient", "merge_lora")
"""Settings that only Python can change."""
_PLACES = ("run_dir", "resume")


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Return settings, by name, as arguments of the command line."""
    defaults = TrainConfig().flat()
    flags: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(defaults[name], bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple | list):
            flags += [flag, *map(str, value)]
        else:
            flags += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return flags


def reproducing_flags(config: TrainConfig, processes: int = 1) -> list[str]:
    """Return the shortest arguments with which `ddpo-train` resolves to the settings of a run, in a new folder.

    Settings that have no effect are left out.

    Args:
        config: resolved.
        processes: that trained together.

    Raises:
        ValueError: if the settings cannot be given on the command line.
    """
    unused = unused_settings(config)
    wanted = _compared(config, unused)
    defaults = TrainConfig() if config.preset is None else preset_config(config.preset)
    own = defaults.changed(algorithm=config.algorithm).with_algorithm_defaults().flat()
    own["algorithm"] = defaults.algorithm
    given = {name: value for name, value in wanted.items() if value != own[name]}
    if unreachable := [name for name in _SUPPRESSED if name in given]:
        raise ValueError(f"only Python can set {', '.join(unreachable)}, with train_config")
    for name in list(given):  # what the other settings resolve to need not be given
        others = {other: value for other, value in given.items() if other != name}
        try:
            is_implied = _compared(defaults.changed(**others).resolved(processes), unused) == wanted
        except ValueError:
            continue
        if is_implied:
            given = others
    if _compared(defaults.changed(**given).resolved(processes), unused) != wanted:
        raise ValueError("the settings are not those that a command line resolves to")
    preset = [] if config.preset is None else ["--preset", config.preset]
    return [*preset, *flags_of(given)]


def reproducing_command(config: TrainConfig, processes: int = 1) -> str:
    """Return the whole command; see `reproducing_flags`."""
    start = ["ddpo-train"]
    if processes > 1:
        start = ["torchrun", f"--nproc-per-node={processes}", "-m", "agents.training.command"]
    return quoted(*start, *reproducing_flags(config, processes))


def _compared(config: TrainConfig, unused: Collection[str]) -> dict[str, Any]:
    left_out = {*_PLACES, *unused}
    return {name: value for name, value in config.flat().items() if name not in left_out and "sha256" not in name}
