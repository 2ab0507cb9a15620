"""From a configuration to a run that is ready: first everything that needs no loading is checked, then it is loaded.

A dry run stops between the two (`check_run`), so it refuses whatever a real run would refuse there.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.utils import set_random_seed

from agents.config.resolve import resolve
from agents.config.train_config import TrainConfig
from agents.distributed import Processes, start_processes
from agents.output.files import check_writable
from agents.planning.fit import check_fit
from agents.rollout.vec_env import VectorEnvAdapter
from agents.training.build import build_algorithm
from agents.training.checkpoint import check_resumable, run_identity
from agents.training.host_memory import keep_freed_memory
from agents.training.monitoring.held_out_images import HeldOutImages
from agents.training.monitoring.holdout_reward import (
    HoldoutReward,
    configured_holdout_reward,
    naming_holdout_reward,
)
from agents.training.monitoring.monitors import Monitors
from agents.training.monitoring.over_optimisation import OverOptimisationBrake
from agents.training.result import RunResult
from agents.training.run import Run, RunListener
from agents.training.run_folder import RunFolder
from ddpo_env.models import DiffusionModel, abilities_of, check_source, load_model
from ddpo_env.models.prompt_images import with_prompt_images
from ddpo_env.prompts import PromptDistribution, PromptSet, load_prompts
from ddpo_env.vector_env import DenoisingVectorEnv
from rewards import (
    Loadable,
    LogsAnswers,
    Reward,
    check_differentiable,
    check_prompts,
    check_shareable,
    configured_reward,
    parse_options,
)

_ENVIRONMENT = "ddpo_env:DDPO-SD-v0"
EVAL_SEED_OFFSET = 1_000_000
"""Held-out seeds start this far above the run's; the training sub-environments use the ones right above the run's."""


@dataclass(frozen=True)
class CheckedRun:
    """A run that can start, as far as that is known without loading, downloading or writing anything.

    Attributes:
        config: resolved; for a resumed run, the run's own.
        folder: of the run.
        reward: with its options, not loaded.
        prompts: their distribution.
        holdout: the held-out reward with its options, not loaded; `None` if there is none.
    """

    config: TrainConfig
    folder: RunFolder
    reward: Reward
    prompts: PromptDistribution
    holdout: Reward | None = None


def start_run_processes(config: TrainConfig) -> Processes:
    """Connect the processes that a launcher started for a run, on the device of its settings.

    Raises:
        ValueError: as `start_processes`.
    """
    if config.resume is not None:
        with suppress(ValueError):  # the error is shown when the settings are resolved
            config = TrainConfig.read(config.resume)
    return start_processes(config.device, config.run.process_timeout)


def check_run(config: TrainConfig, processes: Processes) -> CheckedRun:
    """Resolve a configuration and check whatever can be checked without loading anything.

    A reward of the user's own is constructed, because its constructor checks its options.

    Args:
        config: every setting.
        processes: that train together, each of which calls this.

    Raises:
        ValueError: for a setting that is not valid; for a folder that holds another run; for a reward, prompts, a
            device, a dtype or a model that do not exist, or a reward that several processes cannot share.
        TypeError: if the reward does not take its options.
        ImportError: if a package is missing that the reward needs.
    """
    is_named = config.run_dir is not None or config.resume is not None
    config = processes.from_main(lambda: resolve(config, processes.count))
    with processes.fail_together():
        assert config.run_dir is not None
        folder = RunFolder(config.run_dir, resume=config.resume is not None, unique=not is_named)
        check_writable("run_dir", folder.path, "folder")
        if folder.is_resumed:
            check_resumable(folder.checkpoints, config.total_iterations, run_identity(config))
        reward = configured_reward(config.reward, parse_options(config.reward_options))
        if processes.count > 1:
            check_shareable(reward)
        if config.traits.differentiates_reward:
            check_differentiable(reward)
        prompts = load_prompts(config.prompts)
        assert isinstance(prompts, PromptSet)
        check_prompts(reward, prompts)
        check_source(
            config.model,
            processes.device or config.device,
            config.run.dtype,
            quantization=config.run.quantization,
        )
        check_fit(config, reward)
        holdout = configured_holdout_reward(config)
        if holdout is not None:
            with naming_holdout_reward(config.run.holdout_reward):
                check_fit(config, holdout)
                check_prompts(holdout, prompts)
    return CheckedRun(config, folder, reward, prompts, holdout)


def prepare_run(config: TrainConfig, processes: Processes | None = None) -> Run:
    """Check a configuration, load what the run needs, and restore a resumed run from its checkpoint.

    Args:
        config: every setting.
        processes: that train together, each of which calls this; default: those that a launcher started.

    Raises:
        ValueError, TypeError, ImportError: as `check_run`, or if the loaded model does not fit the settings.
        OSError: if a model cannot be downloaded.
        RuntimeError: if the reward needs a server that does not answer.
    """
    processes = processes or start_run_processes(config)
    checked = check_run(config, processes)
    try:
        with processes.fail_together():
            run = _load(checked, processes)
        run.algorithm.broadcast_weights()
        if checked.folder.is_resumed:
            run.restore()
    except BaseException:
        checked.folder.release()
        raise
    return run


def run_training(config: TrainConfig) -> RunResult:
    """Prepare a run and train it; see `prepare_run` for the errors and `Run.train` for the result."""
    started = time.perf_counter()
    return prepare_run(config).train(started)


def load_configured_model(checked: CheckedRun, processes: Processes) -> DiffusionModel:
    """Load the model of a run, on this process's device."""
    config, settings = checked.config, checked.config.run
    return load_model(
        config.model,
        processes.device or config.device,
        settings.dtype,
        settings.resolution,
        with_prompt_images(config.model, checked.prompts, settings.size[1]),
        settings.quantization,
        base_lora=settings.base_lora,
        offload_text_encoder=settings.offload_text_encoder,
        vae_tiling=settings.vae_tiling,
    )


def training_env(checked: CheckedRun, model: DiffusionModel, processes: Processes) -> VectorEnvAdapter:
    """Make the environment that a run trains on; with several processes, this one's part."""
    training = checked.config.training
    env = gym.make_vec(
        _ENVIRONMENT,
        num_envs=training.sample_batch_size // processes.count,
        autoreset_mode=AutoresetMode.SAME_STEP,
        samples_per_prompt=training.samples_per_prompt,
        shared_noise=training.shared_noise,
        deferred_rewards=True,
        **_env_arguments(checked, model, processes),
    )
    return VectorEnvAdapter(env)


def _env_arguments(checked: CheckedRun, model: DiffusionModel, processes: Processes) -> dict[str, Any]:
    config = checked.config
    return {
        "part": (processes.index, processes.count),
        "model": model,
        "reward": checked.reward,  # one object, so that training and evaluation share its models and statistics
        "prompts": checked.prompts,
        "num_inference_steps": config.num_inference_steps,
        "backend": "torch",
        "non_finite_rewards": "keep" if config.training.non_finite_rewards == "drop" else "raise",
    }


def _load(checked: CheckedRun, processes: Processes) -> Run:
    """Load the model and make environment, algorithm and held-out images; with several processes, this one's part."""
    config = checked.config
    model = load_configured_model(checked, processes)
    set_random_seed(config.seed)
    env = training_env(checked, model, processes)
    eval_env: Any = gym.make_vec(
        _ENVIRONMENT,
        num_envs=config.eval_batch_size // processes.count,
        autoreset_mode=AutoresetMode.DISABLED,
        **_env_arguments(checked, model, processes),
    ).unwrapped
    if isinstance(checked.reward, Loadable):
        checked.reward.load()  # shows what the reward lacks now, not after the first images
    if isinstance(checked.holdout, Loadable) and processes.is_main:
        with naming_holdout_reward(config.run.holdout_reward):
            checked.holdout.load()
    if processes.is_main:
        checked.folder.make()
        config = replace(config, run_dir=Path(str(checked.folder)))
        if isinstance(checked.reward, LogsAnswers):
            checked.reward.log_to(checked.folder.judge)
        if isinstance(checked.holdout, LogsAnswers):
            checked.holdout.log_to(checked.folder.judge / "holdout")
    algorithm = build_algorithm(config, env, processes)
    if algorithm.device.type == "cpu":
        keep_freed_memory()
    return Run(config, algorithm, checked.folder, _listeners(config, checked.holdout, eval_env))


def _listeners(config: TrainConfig, holdout: Reward | None, eval_env: DenoisingVectorEnv) -> list[RunListener]:
    """Return what watches the run: held-out images, monitors, and the brake if it is wanted."""
    settings, scored = config.run, None
    if holdout is not None:
        metadata = dict(abilities_of(eval_env.model).sample_metadata)
        scored = HoldoutReward(holdout, str(settings.holdout_reward), config.eval_batch_size, metadata)
    seed, window = config.seed + EVAL_SEED_OFFSET, config.update.timestep_window
    noisy = config.policy.sampler_table(eval_env.model, config.num_inference_steps).is_stochastic.numpy()
    images = HeldOutImages(eval_env, settings.eval_samples, settings.eval_interval, seed, window, scored, noisy)
    brake = [OverOptimisationBrake()] if settings.stop_at_overoptimisation else []
    return [images, Monitors(eval_env.model), *brake]
