"""Reads settings from YAML files, which may be anybody's: plain values come out, and nothing is ever executed.

Only what `yaml.safe_dump` writes for settings is accepted: mappings with names, sequences and scalars. Aliases,
anchors, tags, repeated names, deep nesting and large files are errors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ddpo_env.validation.options import shown

_MOST_BYTES = 1_000_000


def read_plain_yaml(path: Path) -> Any:
    """Return the values in a `config.yaml` that has at most 1 MB.

    Raises:
        ValueError: if it holds anything but plain values, naming the line.
        OSError: if it cannot be read.
    """
    return _read(path, _PlainLoader)


def read_handwritten_yaml(path: Path) -> Any:
    """Return the values in a YAML file that a person wrote: as `read_plain_yaml`, but 1e-3 is a number.

    In YAML 1.1, which PyYAML reads, only 1.0e-3 is one, and 1e-3 is text; in YAML 1.2 both are numbers. The file may be
    one level deeper than a `config.yaml`.

    Raises:
        ValueError, OSError: as `read_plain_yaml`.
    """
    return _read(path, _HandwrittenLoader)


def _read(path: Path, loader: type[_PlainLoader]) -> Any:
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it must have at most {_MOST_BYTES:,} bytes")
    try:
        return yaml.load(content.decode("utf-8"), loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"it must be UTF-8 text; {error}") from error
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses whatever settings do not need."""

    deepest = 4
    """Levels of a file of settings: the file, a group, a list, its elements."""
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node without alias, anchor or tag."""
        event = self.peek_event()
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise ValueError(f"{where}: aliases and anchors are not valid in settings")
        if event.tag is not None:
            raise ValueError(f"{where}: tags are not valid in settings; got {shown(event.tag)}")
        self._depth += 1
        if self._depth > self.deepest:
            raise ValueError(f"{where}: settings are nested at most {self.deepest} levels deep")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping whose keys are names that occur once."""
        seen: set[str] = set()
        for key, _ in node.value:
            where = f"line {key.start_mark.line + 1}"
            if key.tag != "tag:yaml.org,2002:str":
                raise ValueError(
                    f"{where}: names must be text, in quotes if they look like a number or yes; got {shown(key.value)}"
                )
            if key.value in seen:
                raise ValueError(f"{where}: {shown(key.value)} must occur once")
            seen.add(key.value)
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


class _HandwrittenLoader(_PlainLoader):
    """The same for files of several named settings, with YAML 1.2's numbers."""

    deepest = 5


_HandwrittenLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)
