"""Ranges that settings declare in their annotations, and the one function that checks values against them.

A frozen dataclass of settings writes `kl_coef: Annotated[float, Range(at_least=0)] = 0.0` and calls `check_fields` in
`__post_init__`. A value is then checked in the same way from Python, from the command line and from a file.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rewards.registry import did_you_mean

_Options = TypeVar("_Options")
_Init = TypeVar("_Init", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """Valid finite values of a number, for an annotation.

    Attributes:
        at_least: smallest valid value.
        above: a bound that is itself not valid.
        below: a bound that is itself not valid.
        at_most: largest valid value.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __contains__(self, value: float) -> bool:
        """Compare before asking whether the value is finite: `math.isfinite` cannot take an integer above 1e308."""
        return (
            -math.inf < value < math.inf
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "below": self.below, "at most": self.at_most}
        given = {
            word: f"{bound:{'' if isinstance(bound, int) else 'g'}}"
            for word, bound in bounds.items()
            if bound is not None
        }
        if len(given) == 2:
            (low, first), (high, last) = given.items()
            return f"in {'[' if low == 'at least' else '('}{first}, {last}{']' if high == 'at most' else ')'}"
        return " ".join(f"{word} {bound}" for word, bound in given.items()) or "finite"


NOT_NEGATIVE = Range(at_least=0)
POSITIVE = Range(above=0)
DECAY = Range(at_least=0, below=1)


def check_fields(options: Any) -> None:
    """Check every field of a dataclass instance against its annotation; fields that are dataclasses check themselves.

    Numbers of other libraries, such as NumPy's, become Python's own, so that every file format can hold them.

    Raises:
        ValueError: naming the field, its value and what is valid.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value = getattr(options, field.name)
        check_value(field.name, value, hints[field.name])
        if isinstance(value, numbers.Number) and type(value) not in (bool, int, float):
            plain = int(value) if isinstance(value, numbers.Integral) else float(value)  # type: ignore[arg-type]
            object.__setattr__(options, field.name, plain)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Check a value against an annotation.

    Args:
        name: of the setting, for the error.
        value: of the setting.
        hint: annotation: a number, which must be finite; a string, which must hold something; a path, a boolean, a
            `Literal`, a tuple, another class, or a union of these. `Range`s in an `Annotated` are checked too.

    Raises:
        ValueError: naming the setting, its value and what is valid.
    """
    ranges: list[Range] = []
    while get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        ranges += [extra for extra in extras if isinstance(extra, Range)]
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in choices:
        return
    kinds = [one for one in choices if one is not NoneType]
    tuples = [one for one in kinds if get_origin(one) is tuple]
    if tuples and (len(kinds) == 1 or isinstance(value, tuple)):
        _check_tuple(name, value, get_args(tuples[0]), ranges)
        return
    if all(expected := [_expected(value, kind) for kind in kinds]):
        optional = "None or " if NoneType in choices else ""
        names = [str(one) for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
        raise ValueError(
            f"{name} must be {optional}{' or '.join(map(str, expected))}; got {shown(value)}"
            f"{did_you_mean(value, names)}"
        )
    if float in kinds and not ranges:
        ranges = [Range()]
    number = _as_float(value) if float in kinds else value
    for valid in ranges:
        if number not in valid:
            raise ValueError(f"{name} must be {valid}; got {shown(value)}")


def shown(value: Any) -> str:
    """Return a value for an error, as `repr` does and at most 200 characters of it."""
    try:
        text = repr(value)
    except Exception:  # such as an integer of more digits than Python prints
        text = f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text):,} characters)"


def split_options(options_class: type[_Options], arguments: dict[str, Any]) -> tuple[_Options, dict[str, Any]]:
    """Take the fields of a class of options out of keyword arguments; return the options and the other arguments."""
    names = {field.name for field in fields(options_class)}  # type: ignore[arg-type]
    own = {name: value for name, value in arguments.items() if name in names}
    return options_class(**own), {name: value for name, value in arguments.items() if name not in names}


def shows_options(options_class: type[Any]) -> Callable[[_Init], _Init]:
    """Decorate a constructor that takes `**options`, so that its signature shows the fields of a class of options."""

    def show(init: _Init) -> _Init:
        signature = inspect.signature(init)
        shown = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        known = {parameter.name for parameter in shown}
        for field in fields(options_class):
            if field.name not in known:
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                shown.append(
                    inspect.Parameter(
                        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type
                    )
                )
        rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        init.__signature__ = signature.replace(parameters=[*shown, *rest])  # type: ignore[attr-defined]
        return init

    return show


def _expected(value: Any, hint: Any) -> str | None:
    """Return what a value of this type must be, if it is not that."""
    if get_origin(hint) is Literal:
        is_one = any(type(value) is type(one) and value == one for one in get_args(hint))
        return None if is_one else f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return None if isinstance(value, tuple) else "a tuple"
    if hint is str and isinstance(value, str):
        return _expected_text(value)
    valid: dict[Any, tuple[type | tuple[type, ...], str]] = {
        bool: (bool, "True or False"),
        int: (numbers.Integral, "an integer"),
        float: (numbers.Real, "a number"),
        str: (str, "a string"),
        Path: (Path, "a path"),
    }
    if hint not in valid:
        return None if hint is Any or not isinstance(hint, type) or isinstance(value, hint) else f"a {hint.__name__}"
    types, name = valid[hint]
    is_flag = isinstance(value, bool) and hint is not bool
    if hint is Path and isinstance(value, Path):
        return _expected_text(str(value))
    return None if isinstance(value, types) and not is_flag else name


def _as_float(value: Any) -> float:
    """Return a number as a float: infinite if it is an integer above all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _expected_text(value: str) -> str | None:
    """Refuse text that names nothing, and characters that neither a file nor a file's name can hold."""
    if not value.strip():
        return "a string that is not empty"
    is_storable = "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return None if is_storable else "valid Unicode text without NUL"


def _check_tuple(name: str, value: Any, element_hints: tuple[Any, ...], ranges: list[Range]) -> None:
    """Check a tuple and its elements; the ranges of the whole are those of every element."""
    is_open = len(element_hints) == 2 and element_hints[1] is Ellipsis
    if not isinstance(value, tuple) or not (is_open or len(value) == len(element_hints)):
        length = "" if is_open else f" of {len(element_hints)} values"
        raise ValueError(f"{name} must be a tuple{length}; got {shown(value)}")
    for index, element in enumerate(value):
        hint = element_hints[0 if is_open else index]
        check_value(f"{name}[{index}]", element, Annotated[hint, *ranges] if ranges else hint)
