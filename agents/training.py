"""A whole training run from its configuration: environment, policy, algorithm, pictures, checkpoints, summary."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.logger import CSVOutputFormat, Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import set_random_seed

import ddpo_env  # noqa: F401  (registers DDPO-SD-v0)
from agents.advantages import AdvantageEstimator, GeneralizedAdvantage, PerPromptAdvantage
from agents.callbacks import HeldOutPictures
from agents.checkpoint import Stateful, latest_checkpoint, load_checkpoint, save_checkpoint
from agents.configuration import TrainConfig
from agents.console import ConsoleWriter
from agents.diffusion_policy import DiffusionPolicy
from agents.ppo import PPO
from agents.run_folder import RunFolder
from agents.vec_env import VectorEnvAdapter
from ddpo_env.vector_env import DenoisingVectorEnv

_EVAL_SEED_OFFSET = 1_000_000
"""Held-out seeds begin this far above the run's; the training slots' seeds are the ones right above the run's."""
_GRID_COLUMNS = 9


@dataclass(frozen=True)
class RunResult:
    """How a run went.

    Attributes:
        folder: where everything is.
        reward_before: mean on the held-out seeds before training.
        reward_after: the same after training; `None` if the run was stopped.
        iterations: that are done.
        wall_clock_seconds: of this process, from the call of `run_ppo` on.
    """

    folder: RunFolder
    reward_before: float
    reward_after: float | None
    iterations: int
    wall_clock_seconds: float


def run_ppo(config: TrainConfig, started: float | None = None) -> RunResult:
    """Train a diffusion model with PPO and per-prompt advantages (DDPO-IS), as configured.

    Args:
        config: every setting; see `agents.configuration`.
        started: `time.perf_counter()` at the start of the program, so that the time includes its imports.

    Returns:
        Reward before and after, and the run's folder. After Ctrl-C, `reward_after` is `None`, and the run can be resumed.

    Raises:
        ValueError: if the configuration cannot run; nothing is loaded then.
    """
    started = time.perf_counter() if started is None else started
    resuming = config.run.resume
    if resuming is not None:
        config = _resumed_config(config)
    config.check()
    if config.run.run_dir is None:
        config.run.run_dir = Path("runs") / f"{_file_name(config.task.reward)}-{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoint = latest_checkpoint(config.run.run_dir / "checkpoints") if resuming else None
    algorithm, pictures = build_ppo(config, resume=checkpoint is not None)
    folder = pictures.folder
    done = 0
    done = load_checkpoint(checkpoint, algorithm, {"pictures": pictures}) if checkpoint is not None else 0
    folder.write_config(config.as_dict())
    with _logging(algorithm, folder, config.run.iterations, done):
        after = _train(algorithm, pictures, config, done)
    _save_weights(algorithm, folder)
    result = RunResult(folder, pictures.evaluations[0][1], after, pictures.iteration, time.perf_counter() - started)
    if after is not None:
        folder.write_summary(_summary(result, config))
    return result


def _train(algorithm: PPO, pictures: HeldOutPictures, config: TrainConfig, done: int) -> float | None:
    """Run the iterations that are left and evaluate; after Ctrl-C, go back to the last checkpoint and return `None`."""
    keep, interval, last = config.run.keep_checkpoints, config.run.checkpoint_interval, config.run.iterations
    total, callback = algorithm._setup_learn(algorithm.n_steps * algorithm.n_envs * last, pictures, done == 0)
    parts: dict[str, Stateful] = {"pictures": pictures}
    checkpoints = pictures.folder.checkpoints
    try:
        callback.on_training_start({}, {})
        for iteration in range(done + 1, last + 1):
            algorithm.iterate(callback, iteration, total)
            if iteration == last or (interval and iteration % interval == 0):
                save_checkpoint(checkpoints, iteration, algorithm, parts, keep)
        after = pictures.finish()
        algorithm.logger.dump(algorithm.num_timesteps)
        return after
    except KeyboardInterrupt:
        load_checkpoint(latest_checkpoint(checkpoints), algorithm, parts)
        return None


def build_ppo(config: TrainConfig, resume: bool = False) -> tuple[PPO, HeldOutPictures]:
    """Make the environment, the policy, the algorithm and the held-out pictures of a configuration, and the run's folder."""
    task, training, run = config.task, config.training, config.run
    common: dict[str, Any] = {
        "model": task.model,
        "reward": task.reward,
        "prompts": task.prompts,
        "num_inference_steps": task.num_inference_steps,
        "device": run.device,
        "dtype": run.dtype,
        "backend": "torch",
    }
    set_random_seed(run.seed)
    env = gym.make_vec(
        "DDPO-SD-v0",
        num_envs=training.sample_batch_size,
        autoreset_mode=AutoresetMode.SAME_STEP,
        samples_per_prompt=training.samples_per_prompt,
        **common,
    )
    eval_slots = min(run.eval_samples, training.sample_batch_size)
    eval_env = DenoisingVectorEnv(eval_slots, autoreset_mode=AutoresetMode.DISABLED, **common)
    assert run.run_dir is not None
    folder = RunFolder(run.run_dir, resume=resume)
    algorithm = PPO(
        DiffusionPolicy,
        VectorEnvAdapter(env),
        learning_rate=config.optimizer.learning_rate,
        n_steps=task.num_inference_steps * training.samples_per_iteration // training.sample_batch_size,
        batch_size=training.samples_per_iteration * config.trained_steps // training.updates_per_iteration,
        micro_batch_size=training.train_batch_size,
        n_epochs=training.epochs,
        gamma=1.0,
        gae_lambda=1.0,
        clip_range=training.clip_range,
        max_grad_norm=config.optimizer.max_grad_norm,
        target_kl=training.target_kl,
        timestep_fraction=training.timestep_fraction,
        advantage=_advantage(config),
        policy_kwargs=_policy_arguments(config),
        stats_window_size=training.samples_per_iteration,
        seed=run.seed,
        device=env.unwrapped.device,  # type: ignore[attr-defined]
    )
    pictures = HeldOutPictures(
        eval_env,
        folder,
        samples=run.eval_samples,
        columns=_GRID_COLUMNS,
        interval=run.eval_interval,
        seed=run.seed + _EVAL_SEED_OFFSET,
        reward_name=task.reward,
    )
    return algorithm, pictures


def _advantage(config: TrainConfig) -> AdvantageEstimator:
    if config.policy.critic:
        return GeneralizedAdvantage()
    training = config.training
    return PerPromptAdvantage(training.stat_buffer_size, training.stat_min_count, training.advantage_clip)


def _policy_arguments(config: TrainConfig) -> dict[str, Any]:
    optimizer = config.optimizer
    return {
        **vars(config.policy),
        "optimizer_kwargs": {
            "betas": (optimizer.adam_beta1, optimizer.adam_beta2),
            "eps": optimizer.adam_epsilon,
            "weight_decay": optimizer.weight_decay,
        },
    }


@contextmanager
def _logging(algorithm: PPO, folder: RunFolder, iterations: int, done: int) -> Iterator[None]:
    """Log to TensorBoard, `progress.csv` and the screen; a resumed run keeps the rows of its finished iterations."""
    progress = folder.path / "progress.csv"
    rows = list(csv.DictReader(progress.open(newline="")))[:done] if done and progress.exists() else []
    table = CSVOutputFormat(str(progress))
    for row in rows:
        table.write({name: value for name, value in row.items() if value}, dict.fromkeys(row, ()))
    console = ConsoleWriter(iterations, done)
    algorithm.set_logger(Logger(None, [table, TensorBoardOutputFormat(str(folder.tensorboard)), console]))
    try:
        yield
    finally:
        algorithm.logger.close()


def _save_weights(algorithm: PPO, folder: RunFolder) -> None:
    policy = algorithm.policy
    assert isinstance(policy, DiffusionPolicy)
    policy.save(folder.policy)
    if policy.lora_rank > 0:
        policy.save_lora(folder.lora)


def _summary(result: RunResult, config: TrainConfig) -> dict[str, Any]:
    return {
        "reward": config.task.reward,
        "reward_before": result.reward_before,
        "reward_after": result.reward_after,
        "eval_samples": config.run.eval_samples,
        "wall_clock_seconds": round(result.wall_clock_seconds, 1),
        "iterations": result.iterations,
        "reward_queries": result.iterations * config.training.samples_per_iteration,
        "seed": config.run.seed,
    }


def _resumed_config(config: TrainConfig) -> TrainConfig:
    import yaml

    assert config.run.resume is not None
    path = config.run.resume / "config.yaml"
    if not path.is_file():
        raise ValueError(f"resume must be the folder of a run, with a config.yaml; got {str(config.run.resume)!r}")
    resumed = TrainConfig.from_dict(yaml.safe_load(path.read_text()))
    resumed.run.run_dir = config.run.resume
    resumed.run.iterations = max(resumed.run.iterations, config.run.iterations)
    return resumed


def _file_name(reward: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in reward)
