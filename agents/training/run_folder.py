"""The folder of a run: configuration, metrics, images, weights and a summary.

runs/<name>/
    config.yaml                              every setting, as resolved
    progress.csv, tensorboard/               metrics of every iteration
    samples/iteration_0000.png, ...          the same held-out prompts and seeds every time
    samples/images/iteration_0000.png, ...   the same images in a row, in their own size and without labels
    samples/images/iteration_0000.json, ...  their prompts and scores; shown videos (.webp) and sounds (.wav)
    report.html                              all of it on one page: the file to look at first
    samples/before_after.png, reward.png     the two figures to look at first
    reward_against_kl.png                    mean rewards against the distance from the pretrained model
    lora/pytorch_lora_weights.safetensors    for `pipe.load_lora_weights("runs/<name>/lora")`
    policy/                                  for `agents.DiffusionPolicy.load`
    best/                                    the same two of the best evaluation, if training improved on the first
    checkpoints/                             for `--resume`
    judge/                                   images and answers of a judge, or votes, for rewards that log them
    error.txt                                why the run stopped, if an error stopped it; removed when it continues
    summary.json                             reward before and after, time, versions
    .lock                                    held by the process that writes to the folder
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
import traceback
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from stable_baselines3.common.logger import KVWriter, filter_excluded_keys

from agents.output.files import refuse_links, remove_leftovers, write_file
from agents.report.run_data import ITERATION

_FOLDERS = ("samples", "tensorboard", "lora", "policy", "best", "checkpoints", "judge")
_FILES = (
    "config.yaml",
    "progress.csv",
    "reward.png",
    "reward_against_kl.png",
    "error.txt",
    "summary.json",
    "report.html",
)
_LIBRARIES = (
    "torch",
    "gymnasium",
    "stable_baselines3",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "pillow",
)


class RunFolder:
    """Paths of a run, and writing its small files. A run folder has one writer, which holds the lock `.lock`.

    Args:
        path: the folder; it must not hold files of another run unless `resume`. It may be a link, but nothing in it.
        resume: whether the folder holds the run that continues.
        unique: whether `make` may choose `path-2` and so on if the folder exists.

    Attributes:
        path: absolute and without links, so that nothing depends on the working directory; `str(folder)` is the path
            as it was given.

    Raises:
        ValueError: if the folder holds files of a run already, has a link in it, or is a file.
    """

    def __init__(self, path: str | Path, resume: bool = False, unique: bool = False) -> None:
        """Check the folder; nothing is written before `make`."""
        if not str(path) or "\0" in str(path):
            raise ValueError(f"run_dir must be the path of a folder; got {str(path)!r}")
        self.is_resumed = resume
        self.is_unique = unique
        self._given = Path(path)
        self._lock: FileLock | None = None
        self._locate(Path(path).resolve())
        self._check()

    def __str__(self) -> str:
        """Return the path as it was given."""
        return str(self._given)

    def shown(self, path: Path) -> str:
        """Return the path of something in the folder as a person who gave the folder's path expects it."""
        return str(self._given / path.relative_to(self.path))

    def make(self) -> None:
        """Take the lock, and make the folder and its subfolders.

        Raises:
            ValueError: if another process writes to this folder.
            OSError: if the folder cannot be written.
        """
        first, number = self._given, 1
        while self.is_unique:
            try:
                self.path.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
                self._given = first.with_name(f"{first.name}-{number}")
                self._locate(self._given.resolve())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock", blocking=False, thread_local=False)
            self._lock.acquire()
        except Timeout as error:
            self._lock = None
            raise ValueError(
                f"run_dir {str(self)!r} is in use by another process: wait until it ends, or choose another folder"
            ) from error
        except OSError as error:
            raise OSError(f"run_dir {str(self)!r} cannot be written: {error}") from error
        try:
            self._check()  # again, because only now nobody else writes
            remove_leftovers(self.path)
            for folder in (self.images, self.checkpoints, self.tensorboard):
                folder.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back; a process that ends in any way does so too."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _locate(self, path: Path) -> None:
        self.path = path
        self.samples = path / "samples"
        self.images = self.samples / "images"
        self.progress = path / "progress.csv"
        self.lora = path / "lora"
        self.policy = path / "policy"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.judge = path / "judge"
        self.error = path / "error.txt"
        self.best = path / "best"
        self.summary = path / "summary.json"
        self.report = path / "report.html"

    def _check(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"run_dir must be a folder; {str(self)!r} is a file")
        if not self.is_resumed and (found := [name for name in (*_FOLDERS, *_FILES) if _holds_files(self.path / name)]):
            raise ValueError(
                f"run_dir {str(self)!r} holds a run already ({', '.join(found)}): choose another folder, or resume the "
                "run; one that has no checkpoint yet cannot be resumed and may be deleted"
            )
        refuse_links(self.path)
        for name in (*_FOLDERS, *_FILES):
            path, is_folder = self.path / name, name in _FOLDERS
            if path.exists() and path.is_dir() != is_folder:
                raise ValueError(
                    f"{str(path)!r} must be a {'folder' if is_folder else 'file'}, because the run writes it"
                )
        if self.is_resumed:
            MetricsTable.read(self.progress, sys.maxsize)  # shows damage before anything is loaded

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`."""
        write_file(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def write_error(self, error: BaseException) -> None:
        """Write `error.txt`: the traceback, with its causes."""
        write_file(self.error, "".join(traceback.format_exception(error)))

    def remove_ending(self) -> None:
        """Delete `error.txt` and `summary.json`, which say how a run ended that goes on now."""
        self.error.unlink(missing_ok=True)
        self.summary.unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, and add the machine and the library versions."""
        versions = {name: version(name) for name in _LIBRARIES}
        machine = {"python": platform.python_version(), "platform": platform.platform(), "cpu_count": os.cpu_count()}
        text = json.dumps({**summary, "versions": versions, "machine": machine}, indent=2)
        write_file(self.summary, text + "\n")


class MetricsTable(KVWriter):
    """`progress.csv`: one row per iteration, with named columns.

    Every row replaces the whole file, so a killed run never leaves an incomplete one.

    Args:
        path: of the file.
        rows: rows of a resumed run.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Keep the rows; nothing is written before the first new row."""
        self.path = path
        self.rows = [dict(row) for row in rows]

    @staticmethod
    def read(path: Path, iterations: int) -> list[dict[str, str]]:
        """Return the rows of the first iterations from a file; none for a run without a finished iteration.

        Raises:
            ValueError: if the file is damaged.
        """
        if not iterations or not path.exists():
            return []
        try:
            rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True))
            if any(None in row or None in row.values() for row in rows):
                raise ValueError("its rows have different lengths")
            if rows and ITERATION not in rows[0]:
                raise ValueError(f"it has no column {ITERATION}")
            return [row for row in rows if _iteration(row) <= iterations]
        except (ValueError, OverflowError, csv.Error) as error:
            raise ValueError(
                f"{str(path)!r} must be the table of metrics that the run wrote; {error}. Without the file the run can "
                "be resumed, and its earlier metrics are lost"
            ) from error

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Add a row, or complete the last one if it is of the same iteration."""
        row = filter_excluded_keys(key_values, key_excluded, "csv")
        if self.rows and _iteration(self.rows[-1]) == _iteration(row):
            row = self.rows.pop() | row
        self.rows.append(row)
        names = sorted({name for row in self.rows for name in row})
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.path, text.getvalue())

    def close(self) -> None:
        """Do nothing: no file is open."""


def _iteration(row: Mapping[str, Any]) -> int:
    return int(row[ITERATION] or 0)


def _holds_files(path: Path) -> bool:
    """Return whether there is a file, or a folder with anything that is not left over from a killed start."""
    if path.is_dir() and not path.is_symlink():
        return any(_holds_files(one) for one in path.iterdir() if not one.name.startswith("."))
    return path.exists() or path.is_symlink()
