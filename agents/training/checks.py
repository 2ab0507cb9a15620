"""What can be known of a run before anything is loaded: its configuration, resolved, and the parts that it names."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from agents.config.presets import check_preset
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.training.checkpoint import iterations_done, latest_checkpoint
from agents.training.run_folder import RunFolder
from ddpo_env.models.loading import check_source
from ddpo_env.prompts.distributions import PromptDistribution, load_prompts
from rewards import Reward, configured_reward, parse_options, shared
from rewards.devices import resolve_device, resolve_dtype


@dataclass(frozen=True)
class Parts:
    """What a configuration names, as objects that have loaded, asked and written nothing yet.

    Attributes:
        folder: of the run.
        reward: with its options.
        prompts: their distribution.
    """

    folder: RunFolder
    reward: Reward
    prompts: PromptDistribution


def check_parts(config: TrainConfig, resume: bool, processes: Processes) -> Parts:
    """Make what a resolved configuration names, as far as nothing has to be loaded, and check the model's place.

    Raises:
        ValueError: for a folder that holds another run, a reward, prompts, a device, a dtype or a model that there is
            not, or a reward that several processes cannot share.
        TypeError: if the reward does not take its options.
        ImportError: if a package is missing that the reward needs.
    """
    task, run = config.task, config.run
    assert run.run_dir is not None
    folder = RunFolder(run.run_dir, resume=resume)
    reward = configured_reward(task.reward, parse_options(task.reward_options))
    if processes.count > 1:
        shared(reward)  # refuses what cannot be
    prompts = load_prompts(task.prompts)
    resolve_dtype(run.dtype, resolve_device(processes.device or run.device))
    check_source(task.model)
    return Parts(folder, reward, prompts)


def resolve_config(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """Check a configuration and fill its gaps; for a resumed run, return the run's own and the newest checkpoint.

    Raises:
        ValueError: naming the setting, its value, and what is valid.
    """
    check_preset(config.run)
    if config.run.resume is not None:
        return _resumed(config.run.resume, config.run.iterations)
    config.check()
    name = f"{_file_name(config.task.reward)}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = config.run.run_dir if config.run.run_dir is not None else Path("runs") / name
    return replace(
        config,
        run=replace(config.run, run_dir=run_dir, iterations=config.iterations),
        optimizer=replace(config.optimizer, learning_rate=config.learning_rate),
    ), None


def device_of(config: TrainConfig) -> str:
    """Return a configuration's device; of a run to be resumed, the run's own, where its folder can be seen."""
    if config.run.resume is None:
        return config.run.device
    try:
        return str(yaml.safe_load((config.run.resume / "config.yaml").read_text())["run"]["device"])
    except (OSError, TypeError, KeyError, yaml.YAMLError):
        return config.run.device  # what is wrong is told when the run is resumed


def _resumed(run_dir: Path, iterations: int | None) -> tuple[TrainConfig, Path]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"resume must be the folder of a run, with a config.yaml; got {str(run_dir)!r}")
    try:
        config = TrainConfig.from_dict(yaml.safe_load(path.read_text()))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"resume: {str(path)!r} is no run's configuration: {error}") from error
    config.run.run_dir = run_dir
    config.run.iterations = config.iterations if iterations is None else iterations
    config.check()
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    done = iterations_done(checkpoint)
    if config.iterations < done:
        raise ValueError(f"iterations must be at least {done}, which the run has done; got {config.iterations}")
    return config, checkpoint


def _file_name(reward: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in reward)
