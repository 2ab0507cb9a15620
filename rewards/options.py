"""Options of a reward as they are written on a command line: `device=cpu judge_options.timeout=30`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

_TYPED = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null")}
_POWER_OF_TEN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn `key=value` pairs into a dictionary; dots in a key nest.

    A value is a YAML scalar: numbers, booleans and null are what they say, everything else is text, and quotes make
    text of anything. In `module:function.key`, as for a part of a weighted sum, the dots before the colon do not nest.

    Raises:
        ValueError: for a pair without `=` or without a name, or whose key another pair has used; it quotes the pair.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        names = _names(key)
        if not equals or not all(names):
            raise ValueError(f"reward_options must be key=value pairs, such as judge_options.timeout=30; got {pair!r}")
        inner = options
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"reward_options must not give {name} a value and options of its own; got {pair!r}")
        if names[-1] in inner:
            raise ValueError(f"reward_options must name each key once; {key} comes again in {pair!r}")
        inner[names[-1]] = _scalar(text)
    return options


def _names(key: str) -> list[str]:
    module, colon, rest = key.rpartition(":")
    first, *others = rest.split(".")
    return [module + colon + first, *others]


def _scalar(text: str) -> bool | int | float | str | None:
    """Read one plain YAML scalar; not the sexagesimal numbers of YAML 1.1, but powers of ten without a point."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if _POWER_OF_TEN.fullmatch(text):
        return float(text)
    loader = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    if tag not in _TYPED or ":" in text:
        return text
    value: bool | int | float | None = loader.construct_object(yaml.ScalarNode(tag, text))
    return value
