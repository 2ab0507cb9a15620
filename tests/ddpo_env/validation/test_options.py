"""Ranges in annotations: what is valid, and errors that name field, value and what would be."""

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from ddpo_env.validation.options import Range, check_fields, check_value, shows_options, split_options

LONG = "an integer that is too long for the name of a test"


@dataclass(frozen=True, kw_only=True)
class Options:
    rate: Annotated[float, Range(above=0)] = 1.0
    count: Annotated[int, Range(at_least=1)] = 1
    fraction: Annotated[float | None, Range(above=0, at_most=1)] = None
    kind: Literal["a", "b"] = "a"
    window: tuple[Annotated[float, Range(at_least=0)], float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    levels: Annotated[float | tuple[float, ...] | None, Range(at_least=0, at_most=1)] = None
    folder: Path | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rate": 2},
        {"rate": np.float32(0.5)},
        {"count": np.int64(3)},
        {"fraction": 1.0},
        {"window": (0, 2)},
        {"names": ("x", "y")},
        {"levels": 0.5},
        {"levels": (0, 0.5, 1.0)},
        {"folder": Path("x")},
    ],
)
def test_valid_values_are_accepted(settings):
    options = Options(**settings)
    assert {name: getattr(options, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "rate must be above 0; got 0.0"),
        ({"rate": math.inf}, "rate must be above 0; got inf"),
        ({"rate": math.nan}, "rate must be above 0; got nan"),
        ({"rate": "fast"}, "rate must be a number; got 'fast'"),
        ({"rate": True}, "rate must be a number; got True"),
        ({"rate": None}, "rate must be a number; got None"),
        ({"count": 0}, "count must be at least 1; got 0"),
        ({"count": 1.0}, "count must be an integer; got 1.0"),
        ({"count": True}, "count must be an integer; got True"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\]; got 0.0"),
        ({"fraction": "half"}, "fraction must be None or a number; got 'half'"),
        ({"kind": "c"}, "kind must be one of a, b; got 'c'"),
        ({"window": (0.0,)}, r"window must be a tuple of 2 values; got \(0.0,\)"),
        ({"window": [0.0, 1.0]}, "window must be a tuple of 2 values; got"),
        ({"window": (-1.0, 1.0)}, r"window\[0\] must be at least 0; got -1.0"),
        ({"names": "xy"}, "names must be a tuple; got 'xy'"),
        ({"names": (1,)}, r"names\[0\] must be a string; got 1"),
        ({"levels": 1.5}, r"levels must be in \[0, 1\]; got 1.5"),
        ({"levels": (0.5, 1.5)}, r"levels\[1\] must be in \[0, 1\]; got 1.5"),
        ({"levels": (0.5, "1")}, r"levels\[1\] must be a number; got '1'"),
        ({"levels": "0.5"}, "levels must be None or a number or a tuple; got '0.5'"),
        ({"folder": "x"}, "folder must be None or a path; got 'x'"),
        ({"flag": "no"}, "flag must be True or False; got 'no'"),
    ],
)
def test_wrong_value_is_an_error_that_names_it(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Options(**settings)


@pytest.mark.parametrize(
    ("valid", "text", "inside", "outside"),
    [
        (Range(at_least=0), "at least 0", 0, -1),
        (Range(above=0, below=1), "in (0, 1)", 0.5, 0),
        (Range(at_least=0, below=100), "in [0, 100)", 0, 100),
        (Range(above=0, at_most=1), "in (0, 1]", 1, 0),
        (Range(), "finite", -1e300, math.inf),
    ],
)
def test_range_says_what_it_contains(valid, text, inside, outside):
    assert str(valid) == text
    assert inside in valid
    assert outside not in valid


def test_values_can_be_checked_without_a_dataclass():
    check_value("size", 3, Annotated[int | None, Range(at_least=1)])
    check_value("size", None, Annotated[int | None, Range(at_least=1)])
    with pytest.raises(ValueError, match="size must be at least 1; got -3"):
        check_value("size", -3, Annotated[int | None, Range(at_least=1)])


def test_options_are_split_from_other_arguments_and_shown_in_the_signature():
    options, rest = split_options(Options, {"rate": 3.0, "other": 1})
    assert (options, rest) == (Options(rate=3.0), {"other": 1})

    @shows_options(Options)
    def make(name, **options):
        """Take options."""

    shown = inspect.signature(make).parameters
    assert shown["rate"].default == 1.0
    assert next(iter(shown)) == "name"
    assert "options" in shown, "a subclass may pass on more"


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("", str, "x must be a string that is not empty; got ''"),
        ("a\0b", str, "x must be valid Unicode text without NUL"),
        (Path("\udcff"), Path, "x must be valid Unicode text"),
        (math.nan, float, "x must be finite; got nan"),
        (10**400, Annotated[float, Range(above=0)], "x must be above 0; got 1000"),
        (LONG, Annotated[int, Range(at_most=5)], "x must be at most 5; got a int that cannot be printed"),
        (5 * 10**9, Annotated[int, Range(0, at_most=4_000_000_000)], r"x must be in \[0, 4000000000\]; got 5000000000"),
        (5, Options, "x must be a Options; got 5"),
        (1, Literal["1"], "x must be one of 1; got 1"),
        ([1], int | str | None, r"x must be None or an integer or a string; got \[1\]"),
    ],
)
def test_absurd_values_are_refused(value, hint, message):
    value = 10**5000 if value is LONG else value
    with pytest.raises(ValueError, match=message):
        check_value("x", value, hint)


def test_numbers_of_numpy_become_plain_ones():
    options = Options(count=np.int64(3), rate=np.float32(0.5))
    assert (type(options.count), type(options.rate)) == (int, float)
