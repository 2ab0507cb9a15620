"""Wrong values for a setting, made from its annotation, and what a clear error is."""

import functools
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ddpo_env.validation.options import Range

NOT_FINITE = (math.nan, math.inf, -math.inf)
OBJECTS: tuple[Any, ...] = ({"a": 1}, [[1]], object())


def settings_of(options_class: type[Any]) -> dict[str, Any]:
    """Annotations of a dataclass's fields, by name; fields that are dataclasses contribute theirs."""
    found: dict[str, Any] = {}
    hints = get_type_hints(options_class, include_extras=True)
    for field in fields(options_class):
        hint = hints[field.name]
        found |= settings_of(hint) if is_dataclass(hint) else {field.name: hint}
    return found


def wrong_values(hint: Any) -> Iterator[Any]:
    """Yield values that the annotation does not allow: wrong types, numbers out of range, absurd sizes."""
    ranges: list[Range] = []
    while get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        ranges += [extra for extra in extras if isinstance(extra, Range)]
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    if optional:
        hint = functools.reduce(operator.or_, (one for one in get_args(hint) if one is not NoneType))
    else:
        yield None
    yield from OBJECTS
    if get_origin(hint) is Literal:
        yield from ("nonsense", "", 3, get_args(hint)[0].upper(), True)
    elif get_origin(hint) is tuple:
        yield from ("text", 5, *_wrong_tuples(get_args(hint)))
    elif hint is bool:
        yield from ("yes", "no", "False", 1, 0, 0.5)
    elif hint == int | str:  # a resolution
        yield from ("", "many", "8x", "x8", "0x8", "8 x 8", "8x8x8", "70000x8", 0, -1, 1.5, True, 10**12, b"bytes")
    elif hint is int:
        yield from ("3", "many", 1.5, 2.0, True, *NOT_FINITE, 10**12, 10**400, -1, *_beyond(ranges))
    elif hint is float:
        yield from ("0.1", "much", True, *NOT_FINITE, 1j, 1e39, *_beyond(ranges))
    elif hint == float | tuple[float, ...]:  # of all steps, or of each
        yield from ("0.1", "much", True, *NOT_FINITE, 1j, ("1",), (math.nan,), *_beyond(ranges))
    elif hint is str:
        yield from ("", " ", 5, 0.5, True, b"bytes", "null\0byte")
    elif hint is Path:
        yield from ("", 5, True, b"bytes", "null\0byte")


def _wrong_tuples(element_hints: tuple[Any, ...]) -> Iterator[Any]:
    if element_hints[-1] is Ellipsis:
        yield from ((one,) for one in (5, None, object(), ("nested",)))
        return
    yield from ((), (0.5,), (0.0, 0.5, 1.0), ("0", "1"), (None, None), *((0.0, one) for one in NOT_FINITE))


def _beyond(ranges: list[Range]) -> Iterator[float]:
    for valid in ranges:
        if valid.at_least is not None:
            yield valid.at_least - 1
        if valid.above is not None:
            yield from (valid.above, valid.above - 1)
        if valid.below is not None:
            yield from (valid.below, valid.below + 1)
        if valid.at_most is not None:
            yield valid.at_most + 1


def shown(value: Any) -> str:
    """Name a value in a test's id."""
    is_plain = isinstance(value, str | bytes | int | float | tuple | list | dict | None)
    text = repr(value) if is_plain else getattr(value, "__name__", type(value).__name__)
    return re.sub(r" object at 0x\w+|0x\w+", "", text)[:24]  # the same in every process


def unclear(message: str, name: str, value: Any) -> str | None:
    """Return what a message lacks: the parameter's name, the value (or the start of a long one), what is valid."""
    whole_word = rf"(?<!\w)(?<!\w-)({name}|{name.replace('_', '-')})(?![\w-])"
    if not re.search(whole_word, message):
        return f"does not name {name}"
    # Of a container or an object the message may show the element that is wrong, or the type.
    is_scalar = isinstance(value, bool | int | float | str | bytes)
    spellings = {str(value)[:20], repr(value)[:20], _as_number(value)}
    if is_scalar and not any(text in message for text in spellings):
        return f"does not show the value {value!r}"
    words = (
        "must",
        "needs",
        "there is no",
        "holds",
        "takes no",
        "invalid",
        "did you mean",
        "choose",
        "is not",
        "Error parsing",
    )
    return None if any(word in message for word in words) else "does not say what is valid"


def wrong_texts(hint: Any) -> Iterator[str]:
    """Yield texts that a command line must refuse for a setting with this annotation; none for a flag."""
    is_suppressed = "Suppress" in repr(hint)
    ranges: list[Range] = []
    while get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        ranges += [extra for extra in extras if isinstance(extra, Range)]
    if get_origin(hint) in (Union, UnionType):
        hint = functools.reduce(operator.or_, (one for one in get_args(hint) if one is not NoneType))
    if is_suppressed:
        return
    if get_origin(hint) is Literal:
        yield from ("nonsense", "", "[red]", "--")
    elif hint == int | str:  # a resolution
        yield from ("", "many", "8x", "x8", "0x8", "8 x 8", "8x8x8", "70000x8", "0", "-1", "1.5", "nan", str(10**12))
    elif hint is int:
        yield from ("many", "1.5", "nan", "inf", "", str(10**12), "1e3", *map(_text, _beyond(ranges)))
    elif hint in (float, float | tuple[float, ...]):
        yield from ("much", "nan", "inf", "-inf", "", "1e39", "1j", *map(_text, _beyond(ranges)))
    elif hint in (str, Path):
        yield ""


def _text(number: float) -> str:
    return str(number) if number != int(number) else str(int(number))


def _as_number(value: Any) -> str:
    """Return a number that a command line gives as text in Python's spelling."""
    try:
        return str(float(value))
    except (TypeError, ValueError, OverflowError):
        return str(value)[:20]
