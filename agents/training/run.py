"""A training run as an object: a folder, an iteration counter and a curve.

`Run.train` is the loop over iterations. What happens beside training listens to the run (`RunListener`).
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.algorithms.saving.state import Stateful
from agents.config.train_config import TrainConfig
from agents.evaluation.evaluate import Evaluation
from agents.evaluation.plots import reward_curve
from agents.output.files import refuse_links
from agents.output.terminal import quoted
from agents.planning.memory import fit_micro_batch_size
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.report.page import write_report
from agents.report.run_data import ITERATION
from agents.rollout.vec_env import denoising_env_of
from agents.training.checkpoint import Checkpoints, iterations_done, latest_checkpoint, run_identity
from agents.training.checkpoint_state import check_learned
from agents.training.console import ConsoleWriter, logging_run
from agents.training.monitoring.divergence import LARGEST_KL, spread, watch_reward
from agents.training.result import NO_GRADIENT, RunResult, best_of
from agents.training.run_folder import RunFolder
from ddpo_env.validation.options import NOT_NEGATIVE, Range, check_value
from ddpo_env.vector_env import DenoisingVectorEnv
from rewards import StatefulReward, is_stateful


class RunListener:
    """Something that happens beside training, such as an evaluation. A subclass overrides the moments that it needs."""

    def on_start(self, run: Run) -> None:
        """Act before the first iteration of this process; `run.iteration` are done already."""

    def on_iteration(self, run: Run) -> None:
        """Act after an iteration, before it is logged and before its checkpoint."""

    def on_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        """Act after held-out samples are scored and added to the run's curves, before the iteration is logged."""

    def on_end(self, run: Run) -> None:
        """Act after the last iteration; not for a run that was stopped."""


class Run:
    """A run that is ready to train: everything is loaded and checked.

    With several processes each has a `Run`, and all of them train.

    Args:
        config: resolved.
        algorithm: what trains.
        folder: of the run.
        listeners: in the order in which they are told. Those that are `Stateful` are part of every checkpoint.

    Attributes:
        iteration: number of finished iterations.
        training_rewards: mean training reward of every iteration.
        evaluations: (iteration, mean reward) on the held-out seeds.
        holdout_evaluations: the same of the held-out reward; empty if there is none.
        stopped_early: why a rule has ended the run before its last planned iteration; `None`: none has.
        pretrained_std: standard deviation of the pretrained policy's rewards: the larger one of the held-out samples'
            and the first iteration's; 0 if both have too few samples or prompts for one.
        has_learned: whether any iteration had a gradient.
        kl_to_pretrained: the last one that was measured, in nats per dimension; `None`: none was.
        was_finished: whether another process has finished this run, to its summary.
    """

    def __init__(
        self,
        config: TrainConfig,
        algorithm: TensorOnPolicyAlgorithm,
        folder: RunFolder,
        listeners: list[RunListener],
    ) -> None:
        self.config, self.algorithm = config, algorithm
        self.processes = algorithm.processes
        self.folder, self.listeners = folder, listeners
        self.iteration = 0
        self.training_rewards: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self.holdout_evaluations: list[tuple[int, float]] = []
        self.stopped_early: str | None = None
        self.pretrained_std, self.has_learned = 0.0, False
        self.kl_to_pretrained: float | None = None
        self.checkpoints = Checkpoints(
            folder.checkpoints,
            algorithm,
            self._components(),
            config.run.checkpoint_interval,
            settings=run_identity(config),
        )
        self._is_new, self.was_finished = True, False
        self._warned: set[int] = set()
        self._callback: BaseCallback = CallbackList([])
        self._console: ConsoleWriter | None = None

    def restore(self) -> None:
        """Continue from the newest checkpoint of this run."""
        self.checkpoints.restore()
        self._is_new = False
        written = self.processes.from_main(self.folder.summary.exists)
        self.was_finished = self.is_finished and written

    def train(self, started: float | None = None) -> RunResult:
        """Run the iterations that are left.

        A run that stops for any reason can be resumed from its last finished iteration.

            find the training calls that fit, if that is left open; write config.yaml and a new run's first checkpoint
            tell the listeners: the held-out images are generated and scored
            for each iteration that is left:
                collect a rollout and update the policy      (agents/algorithms/on_policy.py)
                tell the listeners, log the iteration, write its checkpoint
            save policy and LoRA; tell the listeners and draw the curve; write the summary and the report

        Args:
            started: `time.perf_counter()` at the start of the program, so that the time includes imports and loading.

        Returns:
            Reward before and after, and the run's folder. After Ctrl-C, SIGTERM or SIGHUP, `reward_after` is `None`,
            and `self.processes.stopped_by` is the signal. A run that was finished before returns at once.

        Raises:
            BaseException: whatever the reward raises, with a note that names it, or training does; SystemExit too. The
                traceback is also in the folder's `error.txt`. With several processes all of them raise.
        """
        started = time.perf_counter() if started is None else started
        if self.was_finished:
            self.folder.release()
            return self._result(started, finished=True)
        try:
            with self.processes.stop_signals():
                finished = self._run_to_an_end(started)
        except BaseException as error:
            if self.processes.is_main:
                self._write_error(error)
            self._write_report()
            raise
        else:
            self._write_report()
        finally:
            self.folder.release()
        return self._result(started, finished)

    def record_evaluation(self, evaluation: Evaluation) -> None:
        """Add an evaluation of the current iteration to the curves, and save the policy if it is the best so far."""
        rewards, holdout, before = evaluation.finite_rewards(), evaluation.holdout_rewards, self.best_evaluation
        self.evaluations.append((self.iteration, float(rewards.mean())))
        if holdout is not None:
            self.holdout_evaluations.append((self.iteration, float(holdout.mean())))
        if self.iteration == 0:
            self._note_spread(rewards, evaluation.prompts)
        elif self.best_evaluation != before:
            self.processes.from_main(lambda: self._save_weights(self.folder.best))
        for listener in self.listeners:
            listener.on_evaluation(self, evaluation)

    def stop(self, reason: str) -> None:
        """End the run after the current iteration, as one that is finished; all processes call this."""
        self.stopped_early = reason

    @property
    def best_evaluation(self) -> tuple[int, float] | None:
        """Iteration and mean of the best evaluation, by the held-out reward if there is one; `None`: there is none."""
        return best_of(self.holdout_evaluations or self.evaluations)

    @property
    def is_finished(self) -> bool:
        """Whether all iterations are done, or a rule has ended the run."""
        return self.iteration >= self.config.total_iterations or self.stopped_early is not None

    @property
    def saved_iterations(self) -> int | None:
        """Iterations after which `--resume` continues; `None` if there is no checkpoint yet."""
        try:
            return iterations_done(latest_checkpoint(self.folder.checkpoints))
        except ValueError:
            return None

    def state_dict(self) -> dict[str, Any]:
        """Return the counter and the curve, for a checkpoint."""
        return {
            "iteration": self.iteration,
            "training_rewards": self.training_rewards,
            "evaluations": self.evaluations,
            "holdout_evaluations": self.holdout_evaluations,
            "stopped_early": self.stopped_early,
            "pretrained_std": self.pretrained_std,
            "has_learned": self.has_learned,
            "kl_to_pretrained": self.kl_to_pretrained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: naming a value that no run has.
        """
        done, rewards, reason = state["iteration"], state["training_rewards"], state["stopped_early"]
        check_value("iteration", done, Annotated[int, NOT_NEGATIVE])
        check_value("training_rewards", tuple(rewards), tuple[Annotated[float, Range()], ...])
        check_value("pretrained_std", state["pretrained_std"], Annotated[float, NOT_NEGATIVE])
        pair = tuple[Annotated[int, Range(at_least=0, at_most=done)], Annotated[float, Range()]]
        curves = {name: [tuple(one) for one in state[name]] for name in ("evaluations", "holdout_evaluations")}
        for name, evaluations in curves.items():
            check_value(name, tuple(evaluations), tuple[pair, ...])
        check_value("stopped_early", reason, str | None)
        if len(rewards) != done:
            raise ValueError(f"training_rewards must be of iteration={done} iterations; got {len(rewards)}")
        self.iteration, self.training_rewards = done, list(rewards)
        self.evaluations, self.holdout_evaluations = curves["evaluations"], curves["holdout_evaluations"]
        self.stopped_early, self.pretrained_std = reason, state["pretrained_std"]
        self.has_learned = bool(state.get("has_learned", True))  # older checkpoints do not say
        self.kl_to_pretrained = state.get("kl_to_pretrained")

    def _components(self) -> dict[str, Stateful]:
        """Return what a checkpoint holds beside the algorithm: the run, listeners with a state, the reward's state."""
        components: dict[str, Stateful] = {"run": self}
        components |= {type(one).__name__: one for one in self.listeners if isinstance(one, Stateful)}
        if self._env is not None and is_stateful(self._env.reward):
            components["reward"] = cast(StatefulReward, self._env.reward)
        return components

    @property
    def _env(self) -> DenoisingVectorEnv | None:
        assert self.algorithm.env is not None
        return denoising_env_of(self.algorithm.env)

    def _begin(self) -> None:
        """Get ready to iterate; a new run gets its first checkpoint, so that it can be resumed from anywhere."""
        with self.processes.fail_together():
            _, self._callback = self.algorithm._setup_learn(0, None, reset_num_timesteps=self._is_new)
        if self.config.training.train_batch_size == 0:
            size = fit_micro_batch_size(self.algorithm)
            self.config, self.algorithm.micro_batch_size = self.config.changed(train_batch_size=size), size

        def write() -> None:
            self.folder.write_config(self.config.as_dict())
            self.folder.remove_ending()

        self.processes.from_main(write)
        if self._is_new:
            self.checkpoints.save(0)

    def _run_to_an_end(self, started: float) -> bool:
        """Run the iterations that are left; return False if a signal stopped them, at the last finished iteration.

        Whatever ends the iterations, the last finished one has a checkpoint. Signals that come while it is written are
        ignored.
        """
        try:
            with ExitStack() as stack:
                with self.processes.hold_interrupts():
                    logging = logging_run(self.algorithm, self.folder, self.config.total_iterations, self.iteration)
                    self._console = stack.enter_context(logging)
                    self._begin()
                for listener in self.listeners:
                    listener.on_start(self)
                if self.iteration == 0 or self.is_finished:
                    self._log_evaluation()
                while not self.is_finished:
                    self._run_iteration()
                self._finish(started)
            return True
        except KeyboardInterrupt:
            self.processes.ignore_interrupts()
            self._cancel_rewards()
            self.checkpoints.restore()
            self.processes.from_main(lambda: self._save_weights(self.folder.path))
            return False
        except BaseException:
            self.processes.ignore_interrupts()
            self._cancel_rewards()
            self.checkpoints.write()
            raise

    def _finish(self, started: float) -> None:
        """Write what a finished run leaves: weights first, then pictures, and last the summary, which ends the run."""
        self.checkpoints.write()
        self.processes.from_main(lambda: self._save_weights(self.folder.path))
        for listener in self.listeners:
            listener.on_end(self)
        summary = self._result(started, finished=True).summary(self.processes.count)
        curve, file = (self.training_rewards, self.evaluations, self.config.reward), self.folder.path / "reward.png"
        self.processes.from_main(lambda: reward_curve(file, *curve))
        self.processes.from_main(lambda: self.folder.write_summary(summary))

    def _run_iteration(self) -> None:
        algorithm, number = self.algorithm, self.iteration + 1
        steps = algorithm.n_steps * algorithm.n_envs * self.processes.count * self.config.schedule_length
        algorithm.iterate(self._callback, number, steps, log_interval=None)
        check_learned(algorithm)
        self.iteration = number
        returns = algorithm.rollout_buffer.segment_returns()
        self.training_rewards.append(float(returns.mean()))
        if number == 1:
            self._note_spread(returns, algorithm.rollout_buffer.contexts)
        measured = dict(algorithm.logger.name_to_value)
        self.kl_to_pretrained = measured.get("train/kl_to_pretrained", self.kl_to_pretrained)
        self._watch_update(measured)
        for listener in self.listeners:
            listener.on_iteration(self)
        with self.processes.hold_interrupts():
            with self.processes.fail_together():
                algorithm.dump_logs(number)
            self.checkpoints.finished(number)
        if not self.is_finished and self.evaluations[-1][0] == number:
            self._write_report()
        self._watch_reward()

    def _note_spread(self, rewards: npt.NDArray[np.float64], prompts: Sequence[Hashable]) -> None:
        """Widen the scale on which a reward is far worse than the pretrained policy's."""
        source = None if self._env is None else self._env.prompts
        self.pretrained_std = max(self.pretrained_std, spread(rewards, prompts, source))

    def _watch_update(self, measured: Mapping[str, float]) -> None:
        """Note whether the iteration had a gradient; warn of the first without, and of the first that went too far."""
        norm, kl = measured.get("train/grad_norm"), measured.get("train/kl_to_sampling", 0.0)
        has_gradient = bool(measured.get("train/overflowed_updates") if norm is None else norm)
        self.has_learned |= has_gradient
        faults = {
            f"had no gradient, {NO_GRADIENT}: nothing was learned": not has_gradient,
            f"moved the policy by {kl:.3g} nats per dimension of a step: lower learning_rate": kl > LARGEST_KL,
        }
        for index, (words, is_there) in enumerate(faults.items()):
            if is_there and index not in self._warned and self._console is not None:
                self._warned.add(index)
                self._console.warn(f"iteration {self.iteration} {words}")

    def _watch_reward(self) -> None:
        """Warn of an iteration that is far worse than the first one; stop the run after some in a row."""
        stops = self.config.run.stop_on_divergence and self.stopped_early is None
        with self.processes.fail_together():
            warning = watch_reward(self.training_rewards, self.pretrained_std, self.kl_to_pretrained, stops)
        if warning is not None and self._console is not None:
            self._console.warn(warning)

    def _log_evaluation(self) -> None:
        """Log an evaluation that belongs to no iteration of this process; its row has nothing else."""
        with self.processes.fail_together():
            self.algorithm.logger.record(ITERATION, self.iteration, exclude="tensorboard")
            self.algorithm.logger.dump(self.iteration)
        self._write_report()

    def _result(self, started: float, finished: bool) -> RunResult:
        return RunResult(
            config=self.config,
            folder=self.folder,
            reward_before=self.evaluations[0][1] if self.evaluations else None,
            reward_after=self.evaluations[-1][1] if finished else None,
            iterations=self.iteration,
            wall_clock_seconds=time.perf_counter() - started,
            evaluations=tuple(self.evaluations),
            holdout_evaluations=tuple(self.holdout_evaluations),
            stopped_early=self.stopped_early,
            has_learned=self.has_learned,
        )

    def _write_error(self, error: BaseException) -> None:
        try:
            self.folder.write_error(error)
        except OSError as failure:  # a full disk must not hide why the run stopped
            error.add_note(f"{self.folder}/error.txt could not be written: {failure}")

    def _write_report(self) -> None:
        """Write `report.html`. A failure is a warning: it is made of what is stored, so it can be made again."""
        if not self.processes.is_main or not self.evaluations:
            return
        try:
            write_report(self.folder.report, [self.folder.path])
        except Exception as error:
            if self._console is not None:
                again = quoted("ddpo-report", str(self.folder))
                self._console.warn(f"report.html was not written: {error} (the run is whole; try {again})")

    def _cancel_rewards(self) -> None:
        if self._env is not None:
            self._env.cancel_rewards()

    def _save_weights(self, folder: Path) -> None:
        policy = self.algorithm.policy
        assert isinstance(policy, DiffusionPolicy)
        refuse_links(self.folder.path)
        with self.algorithm.averaged_weights():
            policy.save(folder / "policy")
            if policy.options.lora_rank > 0:
                policy.save_lora(folder / "lora")
