"""What the commands print: text from files, servers and users cannot control the terminal, and no encoding ends a run.

Nothing heavy is imported here, so that the first line of a program can use it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console
from rich.text import Text

BAD_ARGUMENTS, INTERRUPTED = 2, 130
"""Exit codes of commands."""
EXPECTED = (ValueError, TypeError, ImportError, OSError, RuntimeError)
"""Errors whose message says everything, so that their type is left out."""


def tolerate_encodings() -> None:
    """Let standard output and standard error print every text: a character that their encoding lacks becomes `?`.

    Call it first in a program. Consoles and files of Windows often have an encoding without `ε` or `→`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def escaped(text: object) -> str:
    r"""Return a text whose control and invisible characters are written as `\x1b`; newlines and tabs stay."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode("ascii")
        for letter in str(text)
    )


def quoted(*arguments: object) -> str:
    """Return arguments as one line for a shell, in which each of them is quoted if it needs that."""
    return shlex.join(str(one) for one in arguments)


def print_line(text: object = "") -> None:
    """Print a text to standard output, escaped."""
    print(escaped(text))


def print_error(message: object) -> None:
    """Print an error to standard error, escaped and without markup."""
    line = Text.assemble(("error:", "red"), " ", escaped(message))
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def describe(error: BaseException, expected: tuple[type[BaseException], ...] = ()) -> str:
    """Return an error and its notes in one line, with its type unless that is expected."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    kind = "" if isinstance(error, expected) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}{notes}".split())


def run_command(work: Callable[[], None], output: Path) -> int:
    """Do the work of a command that writes something, and say where; an error is one line.

    So is every error of code of the user's, such as a reward, which has a note that says so.

    Args:
        work: what the command does.
        output: what it writes.

    Returns:
        The exit code: 0, 2 after an error, 130 after Ctrl-C.
    """
    try:
        work()
    except Exception as error:
        if not isinstance(error, EXPECTED) and not hasattr(error, "__notes__"):
            raise
        print_error(describe(error, EXPECTED))
        return BAD_ARGUMENTS
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    print_line(f"wrote {output}")
    return 0
