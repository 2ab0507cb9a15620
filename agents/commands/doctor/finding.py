"""What a check says: a level, numbers, what they mean, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["green", "amber", "red"]
LEVELS: tuple[Level, ...] = ("green", "amber", "red")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: of the check.
        level: `green`: as it should be. `amber`: the run works, and something needs a look. `red`: do not start it.
        numbers: what was measured, by name with its unit, as plain values for JSON.
        meaning: what the numbers mean.
        advice: what to do; empty if there is nothing to do.
        settings: of the run, with the values that the check recommends, by name.
        seconds: that the check took.
    """

    name: str
    level: Level
    numbers: Mapping[str, Any]
    meaning: str
    advice: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def worst(*levels: Level) -> Level:
    """Return the worst level; green if there is none."""
    return max(levels, key=LEVELS.index, default="green")


def graded(value: float, amber: float, red: float) -> Level:
    """Return the level of a number that should be small: amber and red begin above their limits, NaN is red."""
    if math.isnan(value) or value > red:
        return "red"
    return "amber" if value > amber else "green"
