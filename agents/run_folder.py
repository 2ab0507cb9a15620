"""What a run leaves behind: configuration, metrics, pictures, weights and a summary, in one folder.

runs/<name>/
    config.yaml                              every setting, as resolved
    progress.csv, tensorboard/               metrics of every iteration
    samples/iteration_0000.png, ...          held-out prompts and seeds, the same every time
    samples/before_after.png, reward.png     the two pictures to look at first
    lora/pytorch_lora_weights.safetensors    for `pipe.load_lora_weights("runs/<name>/lora")`
    policy/                                  for `agents.DiffusionPolicy.load`
    checkpoints/                             for `--resume`
    summary.json                             reward before and after, time, versions
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

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
        path: the folder; it is made, and must not hold another run unless `resume`.
        resume: whether to go on in a folder that holds a run.

    Raises:
        ValueError: if the folder holds a run already.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        """Make the folder and its parts."""
        self.path = Path(path)
        if (self.path / "config.yaml").exists() and not resume:
            raise ValueError(f"run_dir {str(path)!r} holds a run already: name another folder, or resume it")
        self.samples = self.path / "samples"
        self.lora = self.path / "lora"
        self.policy = self.path / "policy"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.samples.mkdir(parents=True, exist_ok=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`."""
        (self.path / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, with the machine and the library versions added."""
        versions = {name: version(name) for name in _LIBRARIES}
        machine = {"python": platform.python_version(), "platform": platform.platform(), "cpu_count": os.cpu_count()}
        text = json.dumps({**summary, "versions": versions, "machine": machine}, indent=2)
        write_atomically(self.path / "summary.json", text + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file such that a reader, or a run that was killed, never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
