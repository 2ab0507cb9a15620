"""From a configuration to a run that is ready: first everything that needs no loading is checked, then it is loaded.

A dry run stops between the two (`check_run`), so it refuses whatever a real run would refuse there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.utils import set_random_seed

from agents.config.presets import check_preset
from agents.config.train_config import TrainConfig
from agents.distributed import Processes, start_processes
from agents.planning.memory import fitting_train_batch_size
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter
from agents.training.build import build_algorithm
from agents.training.checkpoint import iterations_done, latest_checkpoint
from agents.training.held_out_images import HeldOutImages
from agents.training.run import Run, RunResult
from agents.training.run_folder import RunFolder
from ddpo_env.models import check_source, load_model
from ddpo_env.prompts import PromptDistribution, load_prompts
from ddpo_env.vector_env import DenoisingVectorEnv
from rewards import Loadable, LogsAnswers, Reward, check_shareable, configured_reward, parse_options
from rewards.devices import resolve_device, resolve_dtype

_EVAL_SEED_OFFSET = 1_000_000
"""Held-out seeds start this far above the run's; the training sub-environments use the ones right above the run's."""


@dataclass(frozen=True)
class CheckedRun:
    """A run that can start, as far as that is known without loading, downloading or writing anything.

    Attributes:
        config: resolved; for a resumed run, the run's own.
        folder: of the run.
        reward: with its options, not loaded.
        prompts: their distribution.
        checkpoint: from which a resumed run continues.
    """

    config: TrainConfig
    folder: RunFolder
    reward: Reward
    prompts: PromptDistribution
    checkpoint: Path | None


def check_run(config: TrainConfig, processes: Processes | None = None) -> CheckedRun:
    """Resolve a configuration and check whatever can be checked without loading anything.

    A reward of the user's own is constructed, because its constructor checks its options.

    Args:
        config: every setting.
        processes: that train together, each of which calls this; default: those that a launcher started.

    Raises:
        ValueError: for a setting that is not valid; for a folder that holds another run; for a reward, prompts, a
            device, a dtype or a model that do not exist, or a reward that several processes cannot share.
        TypeError: if the reward does not take its options.
        ImportError: if a package is missing that the reward needs.
    """
    processes = processes or start_processes(device_of(config), config.run.process_timeout)
    config, checkpoint = processes.from_main(lambda: _resolve(config))
    with processes.fail_together():
        config.check_processes(processes.count)
        assert config.run_dir is not None
        folder = RunFolder(config.run_dir, resume=checkpoint is not None)
        reward = configured_reward(config.reward, parse_options(config.reward_options))
        if processes.count > 1:
            check_shareable(reward)
        prompts = load_prompts(config.prompts)
        resolve_dtype(config.run.dtype, resolve_device(processes.device or config.device))
        check_source(config.model)
    return CheckedRun(config, folder, reward, prompts, checkpoint)


def prepare_run(config: TrainConfig, processes: Processes | None = None) -> Run:
    """Check a configuration, load what the run needs, and restore a resumed run from its checkpoint.

    Args:
        config: every setting.
        processes: as for `check_run`.

    Raises:
        ValueError, TypeError, ImportError: as `check_run`, or if the loaded model does not fit the settings.
        OSError: if a model cannot be downloaded.
        RuntimeError: if the reward needs a server that does not answer.
    """
    processes = processes or start_processes(device_of(config), config.run.process_timeout)
    checked = check_run(config, processes)
    with processes.fail_together():
        run = _load(checked, processes)
    run.algorithm.broadcast_weights()
    if checked.checkpoint is not None:
        run.restore(checked.checkpoint)
    elif run.config.training.train_batch_size == 0:
        assert isinstance(run.algorithm.policy, DiffusionPolicy)
        run.set_train_batch_size(fitting_train_batch_size(run.config, run.algorithm.policy, processes))
    return run


def run_training(config: TrainConfig) -> RunResult:
    """Prepare a run and train it; see `prepare_run` for the errors and `Run.train` for the result."""
    started = time.perf_counter()
    return prepare_run(config).train(started)


def device_of(config: TrainConfig) -> str:
    """Return the device of a configuration; for a run to be resumed the run's own, if its folder can be read."""
    if config.resume is None:
        return config.device
    try:
        return TrainConfig.from_dict(_read_config(config.resume)).device
    except ValueError:
        return config.device  # the error is shown when the run is resumed


def _resolve(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """Return the complete configuration and, for a resumed run, its own configuration and the newest checkpoint."""
    check_preset(config)
    if config.resume is not None:
        return _resumed(config.resume, config.iterations)
    folder_name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in config.reward)
    run_dir = config.run_dir or Path("runs") / f"{folder_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return replace(config, run_dir=run_dir).resolved(), None


def _resumed(run_dir: Path, iterations: int | None) -> tuple[TrainConfig, Path]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"resume must be the folder of a run, with a config.yaml; got {str(run_dir)!r}")
    try:
        own = TrainConfig.from_dict(_read_config(run_dir))
    except ValueError as error:
        raise ValueError(f"resume: {str(path)!r} does not hold the settings of a run: {error}") from error
    config = replace(own, run_dir=run_dir, iterations=iterations or own.iterations).resolved()
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    done = iterations_done(checkpoint)
    if config.total_iterations < done:
        raise ValueError(
            f"iterations must be at least {done}, which the run has finished; got {config.total_iterations}"
        )
    return config, checkpoint


def _read_config(run_dir: Path) -> Any:
    try:
        return yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error


def _load(checked: CheckedRun, processes: Processes) -> Run:
    """Load the model and make environment, algorithm and held-out images; with several processes, this one's part."""
    config, settings = checked.config, checked.config.run
    model = load_model(
        config.model,
        processes.device or config.device,
        settings.dtype,
        settings.resolution,
        offload_text_encoder=settings.offload_text_encoder,
        vae_tiling=settings.vae_tiling,
    )
    common: dict[str, Any] = {
        "part": (processes.index, processes.count),
        "model": model,
        "reward": checked.reward,  # one object, so that training and evaluation share its models and statistics
        "prompts": checked.prompts,
        "num_inference_steps": config.num_inference_steps,
        "backend": "torch",
        "non_finite_rewards": "keep" if config.training.non_finite_rewards == "drop" else "raise",
    }
    set_random_seed(config.seed)
    env = DenoisingVectorEnv(
        config.training.sample_batch_size // processes.count,
        autoreset_mode=AutoresetMode.SAME_STEP,
        samples_per_prompt=config.training.samples_per_prompt,
        deferred_rewards=True,
        **common,
    )
    eval_env = DenoisingVectorEnv(
        config.eval_batch_size // processes.count, autoreset_mode=AutoresetMode.DISABLED, **common
    )
    if isinstance(checked.reward, Loadable):
        checked.reward.load()  # shows what the reward lacks now, not after the first images
    if processes.is_main:
        if isinstance(checked.reward, LogsAnswers):
            checked.reward.log_to(checked.folder.judge)
        checked.folder.make()
    algorithm = build_algorithm(config, VectorEnvAdapter(env), processes)
    images = HeldOutImages(eval_env, settings.eval_samples, settings.eval_interval, config.seed + _EVAL_SEED_OFFSET)
    return Run(config, algorithm, checked.folder, [images])
