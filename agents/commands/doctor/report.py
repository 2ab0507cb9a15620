"""What a user gets: lines on the screen, `doctor.json`, and the settings that the doctor recommends."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from agents.commands.doctor.finding import LEVELS, Finding
from agents.config.reproduction import flags_of
from agents.config.train_config import TrainConfig
from agents.output.files import write_file
from agents.output.terminal import escaped, quoted

_COLOURS = {"green": "green", "amber": "yellow", "red": "red"}
_INDENT, _WIDTH = 26, 120


def show(finding: Finding, console: Console | None = None) -> None:
    """Print a finding: level, name and meaning, and below what to do and the settings."""
    console = console or Console()
    head = Text.assemble(
        (f"{finding.level:6}", _COLOURS[finding.level]), (f"{escaped(finding.name):20}", "bold"), no_wrap=True
    )
    lines = [finding.meaning]
    if finding.advice:
        lines.append(f"→ {finding.advice}")
    if finding.settings:
        lines.append(f"→ settings: {quoted(*flags_of(finding.settings))}")
    body = Text("\n".join(escaped(line) for line in lines))
    width = max(40, (console.width if console.is_terminal else _WIDTH) - _INDENT)
    wrapped = body.wrap(console, width)
    for line in wrapped:
        line.rstrip()
    console.print(head + (wrapped[0] if wrapped else Text()), highlight=False, soft_wrap=True)
    for line in wrapped[1:]:
        console.print(Text(" " * _INDENT) + line, highlight=False, soft_wrap=True)


def write_json(folder: Path, config: TrainConfig, findings: Sequence[Finding]) -> Path:
    """Write `doctor.json`: the settings of the run and every finding. Numbers that are not finite are text."""
    content = {
        "settings": config.as_dict(),
        "levels": levels(findings),
        "findings": [_plain(vars(finding)) for finding in findings],
    }
    path = folder / "doctor.json"
    write_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return path


def levels(findings: Iterable[Finding]) -> dict[str, int]:
    """Return the number of findings of each level."""
    counts = Counter(finding.level for finding in findings)
    return {level: counts[level] for level in LEVELS}


def recommended(config: TrainConfig, findings: Iterable[Finding]) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the settings of the run with those that findings recommend, and these by name.

    The first finding wins. A learning rate is not taken over with another window of timesteps: it was found with the
    configured one, whose largest gradients decide about it.
    """
    changes: dict[str, Any] = {}
    for finding in findings:
        changes = {**finding.settings, **changes}
    if "timestep_window" in changes:
        changes.pop("learning_rate", None)
    return config.changed(**changes).resolved(), changes


def write_settings(folder: Path, config: TrainConfig) -> Path:
    """Write `config.yaml`, which `TrainConfig.read(folder)` reads."""
    path = folder / "config.yaml"
    write_file(path, yaml.safe_dump(config.as_dict(), sort_keys=False))
    return path


def train_command(given: TrainConfig, changes: dict[str, Any]) -> str:
    """Return the command that trains with the settings that the user gave and the recommended ones."""
    given = given.with_algorithm_defaults()
    settings = {name: value for name, value in given.flat().items() if name in given.given} | changes
    return quoted("ddpo-train", *flags_of(settings))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def print_summary(findings: Sequence[Finding], written: Iterable[Path]) -> None:
    """Print the number of findings of each level, and the files."""
    counts = ", ".join(f"{count} {level}" for level, count in levels(findings).items())
    seconds = sum(finding.seconds for finding in findings)
    print(escaped(f"\n{counts} in {seconds:.0f} s; wrote {', '.join(map(str, written))}"), file=sys.stdout)
