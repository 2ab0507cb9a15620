"""From the settings that a user gave to the complete settings of a run: the preset, a run to be resumed, every gap."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from agents.config.presets import check_preset
from agents.config.train_config import TrainConfig
from agents.distributed import Processes, start_processes


def start_run_processes(config: TrainConfig) -> Processes:
    """Connect the processes that a launcher started for a run, on the device of its settings.

    Raises:
        ValueError: as `start_processes`.
    """
    device = config.device
    if config.resume is not None and (config.resume / "config.yaml").is_file():
        with suppress(ValueError):  # the error is shown when the settings are resolved
            device = _own_settings(config.resume).device
    return start_processes(device, config.run.process_timeout)


def resolve(config: TrainConfig, processes: Processes) -> TrainConfig:
    """Return the complete settings of a run, the same in all processes.

    A run to be resumed has its own settings; only `resume` and `iterations` are taken from `config`.

    Raises:
        ValueError: naming the setting, its value and what is valid.
    """
    return processes.from_main(lambda: _resolve(config, processes.count))


def _resolve(config: TrainConfig, processes: int) -> TrainConfig:
    check_preset(config)
    if config.resume is not None:
        own = _own_settings(config.resume)
        iterations = config.iterations or own.iterations
        return replace(own, run_dir=config.resume, resume=config.resume, iterations=iterations).resolved(processes)
    reward = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in config.reward)
    run_dir = config.run_dir or Path("runs") / f"{reward}-{time.strftime('%Y%m%d-%H%M%S')}"
    return replace(config, run_dir=run_dir).resolved(processes)


def _own_settings(run_dir: Path) -> TrainConfig:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"resume must be the folder of a run, with a config.yaml; got {str(run_dir)!r}")
    try:
        settings: Any = yaml.safe_load(path.read_text())
        return TrainConfig.from_dict(settings)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"resume: {str(path)!r} does not hold the settings of a run: {error}") from error
