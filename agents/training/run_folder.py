"""The folder of a run: configuration, metrics, images, weights and a summary.

runs/<name>/
    config.yaml                              every setting, as resolved
    progress.csv, tensorboard/               metrics of every iteration
    samples/iteration_0000.png, ...          the same held-out prompts and seeds every time
    samples/images/iteration_0000.png, ...   the same images in a row, in their own size and without labels
    samples/before_after.png, reward.png     the two files to look at first
    lora/pytorch_lora_weights.safetensors    for `pipe.load_lora_weights("runs/<name>/lora")`
    policy/                                  for `agents.DiffusionPolicy.load`
    best/                                    the same two of the best evaluation, if training improved on the first
    checkpoints/                             for `--resume`
    judge/                                   images and answers of a judge, for rewards that log them
    error.txt                                why the run stopped, if an error stopped it; removed when it continues
    summary.json                             reward before and after, time, versions
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import traceback
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from stable_baselines3.common.logger import KVWriter, filter_excluded_keys

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
    """Paths of a run, and writing its small files.

    Args:
        path: the folder; it must not hold another run unless `resume`.
        resume: whether the folder holds the run that continues.

    Raises:
        ValueError: if the folder holds a run already, or is a file.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        """Check the folder; nothing is written before `make`."""
        self.path = Path(path)
        self.is_resumed = resume
        if (self.path / "config.yaml").exists() and not resume:
            raise ValueError(f"run_dir {str(path)!r} holds a run already: choose another folder, or resume the run")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir must be a folder; {str(path)!r} is a file")
        self.samples = self.path / "samples"
        self.images = self.samples / "images"
        self.progress = self.path / "progress.csv"
        self.lora = self.path / "lora"
        self.policy = self.path / "policy"
        self.best = self.path / "best"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.judge = self.path / "judge"
        self.error = self.path / "error.txt"
        self.summary = self.path / "summary.json"

    def make(self) -> None:
        """Make the folder and its subfolders."""
        self.images.mkdir(parents=True, exist_ok=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`."""
        write_atomically(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def write_error(self, error: BaseException) -> None:
        """Write `error.txt`: the traceback, with its causes."""
        write_atomically(self.error, "".join(traceback.format_exception(error)))

    def remove_ending(self) -> None:
        """Delete `error.txt` and `summary.json`, which say how a run ended that goes on now."""
        self.error.unlink(missing_ok=True)
        self.summary.unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, and add the machine and the library versions."""
        versions = {name: version(name) for name in _LIBRARIES}
        machine = {"python": platform.python_version(), "platform": platform.platform(), "cpu_count": os.cpu_count()}
        text = json.dumps({**summary, "versions": versions, "machine": machine}, indent=2)
        write_atomically(self.summary, text + "\n")


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
        """Return the rows of the first iterations from a file; none for a run without a finished iteration."""
        if not iterations or not path.exists():
            return []
        rows = csv.DictReader(io.StringIO(path.read_text()))
        return [row for row in rows if _iteration(row) <= iterations]

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
        write_atomically(self.path, text.getvalue())

    def close(self) -> None:
        """Do nothing: no file is open."""


def _iteration(row: Mapping[str, Any]) -> int:
    return int(row.get("time/iterations") or 0)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that no reader and no killed run ever leaves or sees an incomplete one."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)
