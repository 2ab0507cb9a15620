"""A whole training run from its configuration: environment, policy, algorithm, pictures, checkpoints, summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import set_random_seed

import ddpo_env  # noqa: F401  (registers DDPO-SD-v0)
from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.config.train_config import TrainConfig
from agents.distributed import Processes, check_shares, start_processes
from agents.planning.memory import settle_train_batch_size
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter
from agents.training.build import build_algorithm
from agents.training.checkpoint import (
    Checkpoints,
    Stateful,
    iterations_done,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from agents.training.checks import check_parts, device_of, resolve_config
from agents.training.console import ConsoleWriter
from agents.training.held_out_images import HeldOutPictures
from agents.training.run_folder import MetricsTable, RunFolder
from ddpo_env.models.loading import load_model
from ddpo_env.vector_env import DenoisingVectorEnv
from rewards import StatefulReward, shared, unshared

_EVAL_SEED_OFFSET = 1_000_000
"""Held-out seeds begin this far above the run's; the training slots' seeds are the ones right above the run's."""
_GRID_COLUMNS = 9


@dataclass(frozen=True)
class RunResult:
    """How a run went.

    Attributes:
        config: as resolved; of a resumed run, the run's own.
        folder: where everything is.
        reward_before: mean on the held-out seeds before training; `None` if the run was stopped in its first
            iteration.
        reward_after: the same after training; `None` if the run was stopped.
        iterations: that are done.
        wall_clock_seconds: of this process, from the call of `run_training` on.
    """

    config: TrainConfig
    folder: RunFolder
    reward_before: float | None
    reward_after: float | None
    iterations: int
    wall_clock_seconds: float


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready: everything is loaded and checked, nothing is trained yet.

    Attributes:
        config: as resolved.
        algorithm: what trains.
        pictures: the held-out pictures, and through them the run's folder.
        checkpoint: where a resumed run goes on.

    Of several processes each has a `PreparedRun`, and all of them train.
    """

    config: TrainConfig
    algorithm: TensorOnPolicyAlgorithm
    pictures: HeldOutPictures
    checkpoint: Path | None

    def train(self, started: float | None = None) -> RunResult:
        """Run the iterations that are left.

        Whatever stops a run, it can be resumed from its last finished iteration.

        Args:
            started: `time.perf_counter()` at the start of the program, so that the time includes imports and loading.

        Returns:
            Reward before and after, and the run's folder. After Ctrl-C, `reward_after` is `None`.

        Raises:
            Exception: whatever the reward raises, with a note that names it, or training does; its traceback is in the
                folder's `error.txt` too. Where several processes train, all of them raise.
        """
        started = time.perf_counter() if started is None else started
        config, algorithm, pictures = self.config, self.algorithm, self.pictures
        processes = algorithm.processes
        try:
            with (
                processes.keeping_interrupts(),
                _logging(algorithm, pictures.folder, config.iterations, iterations_done(self.checkpoint)),
            ):
                _begin(algorithm, pictures, config, is_new=self.checkpoint is None)
                after = _train(algorithm, pictures, config)
            processes.from_main(lambda: _save_weights(algorithm, pictures.folder))
        except Exception as error:
            if processes.is_main:
                pictures.folder.write_error(error)
            raise
        before = pictures.evaluations[0][1] if pictures.evaluations else None
        seconds = time.perf_counter() - started
        result = RunResult(config, pictures.folder, before, after, pictures.iteration, seconds)
        if after is not None and processes.is_main:
            pictures.folder.write_summary(_summary(result, processes.count))
        return result

    @property
    def saved_iterations(self) -> int | None:
        """Iterations after which `--resume` goes on; `None` if there is no checkpoint yet."""
        try:
            return iterations_done(latest_checkpoint(self.pictures.folder.checkpoints))
        except ValueError:
            return None


def prepare_run(config: TrainConfig, processes: Processes | None = None) -> PreparedRun:
    """Load what a run needs, and bring a resumed one to its checkpoint.

    Args:
        config: every setting, see `agents.config.train_config`; it is not changed.
        processes: that train together, each of which calls this; default: those that a launcher started.

    Raises:
        ValueError: if the configuration cannot run, as far as possible before anything is loaded.
        TypeError: if the reward does not take its options.
        ImportError: if a package is missing that the reward needs.
        OSError: if a model cannot be downloaded.
        RuntimeError: if the reward asks a server, and that does not answer.
    """
    processes = processes or start_processes(device_of(config), config.run.process_timeout)
    config, checkpoint = processes.from_main(lambda: resolve_config(config))
    config = settle_train_batch_size(config, processes)
    with processes.agreement():
        check_shares(config, processes.count)
        algorithm, pictures = build_run(config, resume=checkpoint is not None, processes=processes)
    algorithm.equalize()
    if checkpoint is not None:
        load_checkpoint(checkpoint, algorithm, _parts(pictures))
    return PreparedRun(config, algorithm, pictures, checkpoint)


def check_run(config: TrainConfig, processes: Processes | None = None) -> TrainConfig:
    """Check whatever of a run can be checked without loading, downloading, asking or writing anything.

    A reward of the user's own is constructed, as its constructor is what checks its options. What only the loaded model
    or an answer of a server could tell, shows in `prepare_run`.

    Args:
        config: every setting; it is not changed.
        processes: as for `prepare_run`.

    Returns:
        The configuration as resolved; of a resumed run, the run's own.

    Raises:
        ValueError, TypeError, ImportError: as `prepare_run`.
    """
    processes = processes or start_processes(device_of(config))
    config, checkpoint = processes.from_main(lambda: resolve_config(config))
    config = settle_train_batch_size(config, processes)
    with processes.agreement():
        check_shares(config, processes.count)
        check_parts(config, checkpoint is not None, processes)
    return config


def run_training(config: TrainConfig) -> RunResult:
    """Prepare a run and train it; see `prepare_run` for the errors and `PreparedRun.train` for the result."""
    started = time.perf_counter()
    return prepare_run(config).train(started)


def _begin(algorithm: TensorOnPolicyAlgorithm, pictures: HeldOutPictures, config: TrainConfig, is_new: bool) -> None:
    """Get ready to iterate; a new run gets its first checkpoint, so that it can be resumed from anywhere."""
    folder = pictures.folder
    with algorithm.processes.agreement():
        algorithm._setup_learn(0, pictures, reset_num_timesteps=is_new)
    if is_new:
        save_checkpoint(folder.checkpoints, 0, algorithm, _parts(pictures), config.run.keep_checkpoints)

    def write() -> None:
        folder.write_config(config.as_dict())
        folder.forget_error()

    algorithm.processes.from_main(write)


def _train(algorithm: TensorOnPolicyAlgorithm, callback: HeldOutPictures, config: TrainConfig) -> float | None:
    """Run the iterations that are left and evaluate; after Ctrl-C, go back to the last finished one and return `None`.

    After an error, the last finished iteration has a checkpoint too.
    """
    assert algorithm.env is not None
    interval, keep = config.run.checkpoint_interval, config.run.keep_checkpoints
    total = algorithm.n_steps * algorithm.n_envs * algorithm.processes.count * config.iterations
    checkpoints = Checkpoints(callback.folder.checkpoints, algorithm, _parts(callback), interval, keep)
    try:
        callback.on_training_start({}, {})
        for iteration in range(callback.iteration + 1, config.iterations + 1):
            algorithm.iterate(callback, iteration, total)
            checkpoints.finished(iteration)
        checkpoints.write()
        after = callback.finish()
        with algorithm.processes.agreement():
            algorithm.logger.dump(algorithm.num_timesteps)
        return after
    except KeyboardInterrupt:
        algorithm.env.env_method("cancel_rewards")
        checkpoints.go_back()
        return None
    except Exception:
        algorithm.env.env_method("cancel_rewards")
        checkpoints.write()
        raise


def _parts(pictures: HeldOutPictures) -> dict[str, Stateful]:
    """What else a checkpoint holds: the curve, and the statistics of a reward that has any."""
    reward = unshared(pictures.env.reward)
    return {"pictures": pictures, **({"reward": reward} if isinstance(reward, StatefulReward) else {})}


def build_run(
    config: TrainConfig, resume: bool = False, processes: Processes | None = None
) -> tuple[TensorOnPolicyAlgorithm, HeldOutPictures]:
    """Make the environment, the policy and the algorithm of a configuration, its held-out pictures and its folder.

    Of several processes each makes its part of the batch, and the main one the folder.
    """
    task, training, run = config.task, config.training, config.run
    processes = processes or Processes()
    parts = check_parts(config, resume, processes)
    folder, reward = parts.folder, parts.reward
    common: dict[str, Any] = {
        "part": (processes.index, processes.count),
        "model": task.model,
        "resolution": task.resolution,
        # One object, so that training and evaluation share its models and statistics.
        "reward": shared(reward) if processes.count > 1 else reward,
        "prompts": parts.prompts,
        "num_inference_steps": task.num_inference_steps,
        "device": processes.device or run.device,
        "dtype": run.dtype,
        "backend": "torch",
        "non_finite_rewards": "keep" if training.non_finite_rewards == "drop" else "raise",
    }
    load_model(
        task.model,
        common["device"],
        run.dtype,
        task.resolution,
        offload_text_encoder=task.offload_text_encoder,
        vae_tiling=task.vae_tiling,
    )  # which environments and policy find again
    set_random_seed(run.seed)
    env = gym.make_vec(
        "DDPO-SD-v0",
        num_envs=training.sample_batch_size // processes.count,
        autoreset_mode=AutoresetMode.SAME_STEP,
        samples_per_prompt=training.samples_per_prompt,
        deferred_rewards=training.overlap_rewards,
        **common,
    )
    eval_slots = min(run.eval_samples, training.sample_batch_size)
    eval_env = DenoisingVectorEnv(eval_slots // processes.count, autoreset_mode=AutoresetMode.DISABLED, **common)
    if callable(load := getattr(reward, "load", None)):
        load()  # what a reward lacks shows now, not after the first pictures
    if processes.is_main:
        if callable(log_to := getattr(reward, "log_to", None)):
            log_to(folder.judge)
        folder.make()
    algorithm = build_algorithm(config, VectorEnvAdapter(env), processes)
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


@contextmanager
def _logging(algorithm: TensorOnPolicyAlgorithm, folder: RunFolder, iterations: int, done: int) -> Iterator[None]:
    """Log to TensorBoard, `progress.csv` and the screen; a resumed run keeps the rows of its finished iterations."""
    if not algorithm.processes.is_main:
        algorithm.set_logger(Logger(None, []))
        yield
        return
    progress = folder.path / "progress.csv"
    table = MetricsTable(progress, MetricsTable.read(progress)[:done])
    console = ConsoleWriter(iterations, done)
    algorithm.set_logger(Logger(None, [table, TensorBoardOutputFormat(str(folder.tensorboard)), console]))
    try:
        yield
    finally:
        algorithm.logger.close()


def _save_weights(algorithm: TensorOnPolicyAlgorithm, folder: RunFolder) -> None:
    policy = algorithm.policy
    assert isinstance(policy, DiffusionPolicy)
    with algorithm.averaged_weights():
        policy.save(folder.policy)
        if policy.lora_rank > 0:
            policy.save_lora(folder.lora)


def _summary(result: RunResult, processes: int) -> dict[str, Any]:
    config = result.config
    return {
        "algorithm": config.training.algorithm,
        "reward": config.task.reward,
        "reward_before": result.reward_before,
        "reward_after": result.reward_after,
        "eval_samples": config.run.eval_samples,
        "wall_clock_seconds": round(result.wall_clock_seconds, 1),
        "iterations": result.iterations,
        "reward_queries": result.iterations * config.training.samples_per_iteration,
        "seed": config.run.seed,
        "processes": processes,
    }
