"""Reads prompt files: text with one prompt per line, JSON, JSON Lines, and tables with a header.

A file comes in, and pairs of a prompt and its metadata go out. The suffix says what the format is; a file whose content
is another format than its suffix says is refused, because its lines would become nonsense prompts. An entry `image`
names an image file, relative to the folder of the prompt file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpo_env.prompts.images import IMAGE, describe_image

_LARGEST = 64 * 2**20
"""Largest size of a file that is read, in bytes."""
_NAMES = ("prompt", "text", "caption")
"""Names of the entry with the prompt, in any case; the first one that an object or a table has is taken."""
SUFFIXES = (".txt", "", ".jsonl", ".json", ".csv", ".tsv")
"""Endings of prompt files. A file without one is text."""


def read_prompt_file(path: Path) -> list[tuple[str, Any]]:
    """Return `(where, prompt)` for every prompt of a file; `where` names file and line for messages.

    A prompt of an object or of a table's row is a mapping, see `split_prompt`. The caller checks the prompts. Images
    are checked here; their paths become absolute.

    Raises:
        ValueError: The file is too large, no UTF-8 text, of another format than its suffix says, or it has no prompts;
            some prompts have an image and others none, or an image cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"prompts must be a file that ends in {', '.join(filter(None, SUFFIXES))}; got {str(path)!r}")
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"prompts {str(path)!r} must be a file of at most {_LARGEST} bytes; it has {size}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {str(path)!r} must be UTF-8 text; {error}") from error
    if suffix == ".json":
        found = list(_in_json(path, text))
    elif suffix == ".jsonl":
        found = [(where, _parsed(where, line)) for where, line in _lines(path, text) if line]
    elif suffix in (".csv", ".tsv"):
        found = list(_in_table(path, text, "," if suffix == ".csv" else "\t"))
    else:
        found = list(_in_text(path, text))
    if not found:
        raise ValueError(f"prompts {str(path)!r} must hold at least one prompt; it holds none")
    return _with_images(path.parent, found)


def prompt_file_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a prompt file and of its images.

    Raises:
        ValueError: as `read_prompt_file`.
    """
    digest = hashlib.sha256(path.read_bytes())
    for where, entry in read_prompt_file(path):
        if isinstance(entry, Mapping) and IMAGE in entry:
            digest.update(describe_image(entry[IMAGE], f"{where}: {IMAGE}").digest.encode())
    return digest.hexdigest()


def split_prompt(entry: Mapping[Any, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """Return the prompt of an object, and its other entries as metadata.

    Raises:
        ValueError: No entry is called prompt, text or caption.
    """
    names = {str(name).lower(): name for name in reversed(list(entry))}
    for name in _NAMES:
        if name in names:
            return entry[names[name]], {str(key): value for key, value in entry.items() if key != names[name]}
    raise ValueError(f"{where} must have an entry {' or '.join(_NAMES)}; it has {', '.join(map(str, entry)) or 'none'}")


def _with_images(folder: Path, found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return prompts whose images have absolute paths; all of them have an image that can be read, or none has one."""
    has_image = [isinstance(entry, Mapping) and IMAGE in entry for _, entry in found]
    if not any(has_image):
        return found
    if not all(has_image):
        raise ValueError(
            f"{found[has_image.index(False)][0]} must have an {IMAGE}, because {found[has_image.index(True)][0]} has "
            "one: all prompts of a file have an image, or none has one"
        )
    complete = []
    for where, entry in found:
        given = entry[IMAGE]
        image = os.path.abspath(folder / given) if isinstance(given, str) and given else given
        describe_image(image, f"{where}: {IMAGE}")
        complete.append((where, {**entry, IMAGE: image}))
    return complete


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    text = text.rstrip().replace("\r\n", "\n").replace("\r", "\n")  # `splitlines` splits at form feeds and others too
    for number, line in enumerate(text.split("\n") if text else (), start=1):
        yield f"prompts {str(path)!r}, line {number}", line.strip()


def _in_text(path: Path, text: str) -> Iterator[tuple[str, str]]:
    if _is_json(text):
        raise ValueError(f"prompts {str(path)!r} must hold one prompt per line; it holds JSON: name it .json")
    for where, line in _lines(path, text):
        if _is_json(line):
            raise ValueError(f"{where}: a prompt must be plain text; it holds JSON: name the file .jsonl")
        if not line:
            raise ValueError(f"{where}: a prompt must not be empty; remove the line or start it with #")
        if not line.startswith("#"):
            yield where, line


def _is_json(text: str) -> bool:
    """Whether a text is a JSON list or object."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    except RecursionError:
        pass
    return True


def _in_json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    where = f"prompts {str(path)!r}"
    entries = _parsed(where, text)
    if isinstance(entries, Mapping) and isinstance(entries.get("prompts"), list):
        entries = entries["prompts"]
    if not isinstance(entries, list):
        raise ValueError(f"{where} must hold a JSON list of prompts, or an object with a list `prompts`")
    yield from ((f"{where}, entry {number}", entry) for number, entry in enumerate(entries, start=1))


def _in_table(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    where = f"prompts {str(path)!r}"
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"{where} must be a table whose columns are separated by {delimiter!r}; {error}") from error
    header = [name.strip() for name in rows[0]] if rows else []
    if not any(name.lower() in _NAMES for name in header):
        raise ValueError(f"{where} must begin with the names of its columns, one of them {' or '.join(_NAMES)}")
    if len(set(header)) < len(header):
        raise ValueError(f"{where} must name each column once; it has {', '.join(header)}")
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != len(header):
            raise ValueError(f"{where}, row {number} must have {len(header)} columns; it has {len(row)}")
        if row:
            yield f"{where}, row {number}", dict(zip(header, row, strict=True))


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_with_unique_keys, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError(f"{where} must be JSON; it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} must be JSON; {error}") from error


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"a number must be finite; got {text}")
    return number


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(f"an object has a key twice: {', '.join(key for key, _ in pairs)}")
    return entries
