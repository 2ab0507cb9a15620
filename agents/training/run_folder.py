"""What a run leaves behind: configuration, metrics, pictures, weights and a summary, in one folder.

runs/<name>/
    config.yaml                               every setting, as resolved
    progress.csv, tensorboard/                metrics of every iteration
    samples/iteration_0000.png, ...           held-out prompts and seeds, the same every time
    samples/pictures/iteration_0000.png, ...  the same pictures in a row, without labels and in their own size
    samples/before_after.png, reward.png      the two pictures to look at first
    lora/pytorch_lora_weights.safetensors     for `pipe.load_lora_weights("runs/<name>/lora")`
    policy/                                   for `agents.DiffusionPolicy.load`
    checkpoints/                              for `--resume`
    judge/                                    what a judge saw and said, for rewards that keep a log of it
    error.txt                                 why the run stopped, if an error did; gone when it goes on
    summary.json                              reward before and after, time, versions
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
    """Paths of a run, and the writing of its small files.

    Args:
        path: the folder; it must not hold another run unless `resume`.
        resume: whether to go on in a folder that holds a run.

    Raises:
        ValueError: if the folder holds a run already, or is a file.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        """Check the folder; nothing is written before `make`."""
        self.path = Path(path)
        if (self.path / "config.yaml").exists() and not resume:
            raise ValueError(f"run_dir {str(path)!r} holds a run already: name another folder, or resume it")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir must be a folder; {str(path)!r} is a file")
        self.samples = self.path / "samples"
        self.pictures = self.samples / "pictures"
        self.lora = self.path / "lora"
        self.policy = self.path / "policy"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.judge = self.path / "judge"
        self.error = self.path / "error.txt"

    def make(self) -> None:
        """Make the folder and its parts."""
        self.pictures.mkdir(parents=True, exist_ok=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`."""
        write_atomically(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def write_error(self, error: BaseException) -> None:
        """Write `error.txt`: the traceback, with its causes."""
        write_atomically(self.error, "".join(traceback.format_exception(error)))

    def forget_error(self) -> None:
        """Delete `error.txt`, if there is one."""
        self.error.unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, with the machine and the library versions added."""
        versions = {name: version(name) for name in _LIBRARIES}
        machine = {"python": platform.python_version(), "platform": platform.platform(), "cpu_count": os.cpu_count()}
        text = json.dumps({**summary, "versions": versions, "machine": machine}, indent=2)
        write_atomically(self.path / "summary.json", text + "\n")


class MetricsTable(KVWriter):
    """`progress.csv`: one row an iteration, columns by name.

    The file is replaced whole with every row, so that a run that was killed never leaves half a row or none at all.

    Args:
        path: of the file.
        rows: that are there already, of a resumed run.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Keep the rows; nothing is written before the first new one."""
        self.path = path
        self.rows = [dict(row) for row in rows]

    @staticmethod
    def read(path: Path) -> list[dict[str, str]]:
        """Return the rows of a file that a table wrote; none if there is no file."""
        return list(csv.DictReader(io.StringIO(path.read_text()))) if path.exists() else []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Add a row, as Stable-Baselines3's logger asks."""
        self.rows.append(filter_excluded_keys(key_values, key_excluded, "csv"))
        names = sorted({name for row in self.rows for name in row})
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue())

    def close(self) -> None:
        """Nothing is open."""


def write_atomically(path: Path, text: str) -> None:
    """Write a text file such that a reader, or a run that was killed, never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
