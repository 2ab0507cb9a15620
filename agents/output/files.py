"""Writing files: completely or not at all, and never through a link to somewhere else.

A file is written under a fresh hidden name beside its place, flushed to the disk, and renamed. A kill or a full disk at
any moment leaves the old file or the new one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

_LEFTOVERS = ".*.part"


def write_file(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file; a link in its place is replaced, not followed.

    Args:
        path: of the file. Its folder exists.
        content: text, which is encoded as UTF-8, or bytes, or a function that writes to the path that it is given.

    Raises:
        OSError: if the file cannot be written, or if a link has taken the place of its folder.
    """
    with _fresh_name(path) as unfinished:
        # Exclusive: what another process has put there is neither followed nor overwritten.
        handle = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(unfinished)
            else:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # of a writable handle, because Windows refuses others
        unfinished.replace(path)


@contextmanager
def leaving_traceback(file: Path) -> Iterator[None]:
    """Write the traceback of an error inside this context to a file, with its causes, and raise the error again."""
    try:
        yield
    except Exception as error:
        write_file(file, "".join(traceback.format_exception(error)))
        raise


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill an empty folder, and put each of its files at its place in `folder`, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    with _fresh_name(folder / "files") as unfinished:
        unfinished.mkdir()
        write(unfinished)
        for file in unfinished.iterdir():
            sync(file)
            file.replace(folder / file.name)


def write_new_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill an empty folder with files, which appears at its place when it is complete.

    Args:
        folder: does not exist; the folders above it are made.
        write: gets the path of the folder while it is hidden.

    Raises:
        OSError: if the folder cannot be written, or has come into being meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _fresh_name(folder) as unfinished:
        unfinished.mkdir()
        write(unfinished)
        for file in unfinished.iterdir():
            sync(file)
        unfinished.rename(folder)


def check_writable(name: str, path: Path, kind: Literal["file", "folder"]) -> None:
    """Refuse a place where a command could not write in the end; nothing is left there.

    Args:
        name: of the argument, for the message.
        path: of what will be written; the folders above it need not exist.
        kind: what it will be.

    Raises:
        ValueError: naming the argument, and the file or folder that cannot be written.
    """
    nearest = next(one for one in (path, *path.absolute().parents) if one.exists())
    is_replaced = kind == "file" and nearest == path and path.is_file()
    try:  # not only os.access, which says yes to root for folders such as /proc
        if is_replaced and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} is read-only")
        with tempfile.TemporaryFile(dir=path.absolute().parent if is_replaced else nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a {kind} that can be written; {str(nearest)!r} is not; got {str(path)!r}"
        ) from error


def sync(file: Path) -> None:
    """Flush a file to the disk, through a writable handle, because Windows refuses others."""
    with file.open("r+b") as handle:
        os.fsync(handle.fileno())


def refuse_links(folder: Path) -> None:
    """Refuse a folder in which there is anything but files and folders, such as a link; the folder itself may be one.

    Raises:
        ValueError: naming the link, or the pipe, socket or device.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() or getattr(path, "is_junction", bool)():  # Windows has both, Python 3.12 sees them
                raise ValueError(f"run_dir must not contain links, which may lead out of it; {str(path)!r} is one")
            if not (path.is_file() or path.is_dir()):
                raise ValueError(f"run_dir must contain only files and folders; {str(path)!r} is neither")


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers have left in a folder that nobody else writes to."""
    for leftover in sorted(folder.rglob(_LEFTOVERS)):
        remove(leftover)


def remove(path: Path) -> None:
    """Delete a file or a folder; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fresh_name(path: Path) -> Path:
    """Return a hidden name beside a path that nobody can have taken.

    Raises:
        OSError: if a link has taken the place of the path's folder, or of one that is above it.
    """
    folder = path.parent.absolute()
    if folder.resolve() != folder:
        raise OSError(f"{str(folder)!r} is or became a link, and {path.name!r} is not written through it")
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


@contextmanager
def _fresh_name(path: Path) -> Iterator[Path]:
    unfinished = fresh_name(path)
    try:
        yield unfinished
    except BaseException:
        remove(unfinished)
        raise
    if unfinished.is_dir():
        unfinished.rmdir()
