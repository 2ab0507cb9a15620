"""`race.json`: everything that a race knows, written completely or not at all, so that it can go on from any moment.

The file describes the race too, and a race never goes on with other settings. It is data: what trains is what the
command line and the file of contenders name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from agents.algorithms.saving.stored_values import read_json
from agents.commands.race.halving import Failure, Result
from agents.output.files import write_file
from ddpo_env.validation.options import Range, check_value, shown

_VERSION = 1


@dataclass
class RaceState:
    """The results of a race so far.

    Attributes:
        description: the race's settings as plain values, by name.
        seconds: that an iteration of a contender takes, by its name, if the budget counts seconds.
        results: in the order in which they came.
        failures: contenders that are out, in the order in which they failed.
    """

    description: Mapping[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the file; a killed process leaves the old one or the new one."""
        content = {
            "version": _VERSION,
            "race": self.description,
            "seconds": self.seconds,
            "results": [asdict(result) for result in self.results],
            "failures": [asdict(failure) for failure in self.failures],
        }
        write_file(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path, description: Mapping[str, Any]) -> RaceState:
        """Return the state in a file, or the state of a race that begins if there is no file.

        Args:
            path: of the file.
            description: of the race that is to go on.

        Raises:
            ValueError: if the file is damaged, or of another race, naming the setting that differs.
        """
        if not path.exists():
            return cls(description)
        try:
            content = read_json(path.read_text(encoding="utf-8"))
            if content.get("version") != _VERSION:
                raise ValueError(f"its version must be {_VERSION}; got {shown(content.get('version'))}")
            if content.keys() != {"version", "race", "seconds", "results", "failures"}:
                raise ValueError(f"it must hold version, race, seconds, results and failures; got {', '.join(content)}")
            before = content["race"]
            state = cls(
                description,
                dict(content["seconds"]),
                [Result(**one) for one in content["results"]],
                [Failure(**one) for one in content["failures"]],
            )
            for name, seconds in state.seconds.items():
                check_value(f"seconds of {name}", seconds, Annotated[float, Range(above=0)])
            named = {*state.seconds, *(one.contender for one in state.results)}
            named |= {one.contender for one in state.failures}
            if unknown := sorted(named - before["contenders"].keys()):
                raise ValueError(f"{shown(unknown[0])} is no contender")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} must hold the results of a race: {error}") from error
        if difference := _difference(before, json.loads(json.dumps(description))):
            raise ValueError(
                f"output: {str(path.parent)!r} holds another race, with {difference}. To go on with it, give the same "
                "command; for a new race, choose another --output"
            )
        return state


def _difference(before: Any, now: Any, name: str = "") -> str:
    """Name the first value in which two descriptions differ; empty if they do not."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if key not in before or key not in now:
                return f"{f'{name}.' if name else ''}{key} {'only here' if key in now else 'only there'}"
            if found := _difference(before[key], now[key], f"{name}.{key}" if name else key):
                return found
        return ""
    return "" if before == now else f"{name}={shown(before)} instead of {shown(now)}"
