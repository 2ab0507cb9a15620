"""From the settings that a user gave to the complete settings of a run: the preset, a run to be resumed, every gap."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from agents.config.presets import check_preset
from agents.config.train_config import TrainConfig


def resolve(config: TrainConfig, processes: int = 1) -> TrainConfig:
    """Return the complete settings of a run that a number of processes train together.

    A run to be resumed has its own settings; only `resume` and `iterations` are taken from `config`.

    Raises:
        ValueError: naming the setting, its value and what is valid.
    """
    check_preset(config)
    if config.resume is not None:
        own = TrainConfig.read(config.resume)
        iterations = config.iterations or own.iterations
        return replace(own, run_dir=config.resume, resume=config.resume, iterations=iterations).resolved(processes)
    reward = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in config.reward)
    run_dir = config.run_dir or Path("runs") / f"{reward}-{time.strftime('%Y%m%d-%H%M%S')}"
    return replace(config, run_dir=run_dir).resolved(processes)
