"""The outcome of a run, and what its `summary.json` says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agents.config.train_config import TrainConfig
from agents.training.run_folder import RunFolder

NO_GRADIENT = "as where all rewards that are compared are equal"


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run.

    Attributes:
        config: as resolved; for a resumed run, the run's own.
        folder: with everything that the run wrote.
        reward_before: mean reward on the held-out seeds before training; `None` if the run stopped before that.
        reward_after: the same after training; `None` if the run was stopped.
        iterations: number of finished iterations.
        wall_clock_seconds: of this process, from the start of the program or of `train`.
        evaluations: (iteration, mean reward) on the held-out seeds.
        holdout_evaluations: the same of the held-out reward; empty if there is none.
        stopped_early: why the run ended before its last planned iteration, if a rule ended it.
        has_learned: whether any iteration had a gradient.
    """

    config: TrainConfig
    folder: RunFolder
    reward_before: float | None
    reward_after: float | None
    iterations: int
    wall_clock_seconds: float
    evaluations: tuple[tuple[int, float], ...] = ()
    holdout_evaluations: tuple[tuple[int, float], ...] = ()
    stopped_early: str | None = None
    has_learned: bool = True

    @property
    def best_evaluation(self) -> tuple[int, float] | None:
        """Iteration and mean of the best evaluation, by the held-out reward if there is one; `None` without any."""
        return best_of(self.holdout_evaluations or self.evaluations)

    def summary(self, processes: int) -> dict[str, Any]:
        """Return the content of `summary.json`; versions and machine are added where it is written."""
        config, best = self.config, self.best_evaluation
        holdout = [mean for _, mean in self.holdout_evaluations]
        return {
            "algorithm": config.algorithm,
            "reward": config.reward,
            "reward_before": self.reward_before,
            "reward_after": self.reward_after,
            "holdout_reward": config.run.holdout_reward,
            "holdout_reward_before": holdout[0] if holdout else None,
            "holdout_reward_after": holdout[-1] if holdout else None,
            "holdout_reward_best": max(holdout, default=None),
            "best_iteration": None if best is None else best[0],
            "stopped_early": self.stopped_early,
            "has_learned": self.has_learned,
            "eval_samples": config.run.eval_samples,
            "wall_clock_seconds": round(self.wall_clock_seconds, 1),
            "iterations": self.iterations,
            "reward_queries": self.iterations * config.samples_per_iteration,
            "seed": config.seed,
            "processes": processes,
        }


def best_of(evaluations: tuple[tuple[int, float], ...] | list[tuple[int, float]]) -> tuple[int, float] | None:
    """Return the first of the highest of evaluations (iteration, mean); `None` if there are none."""
    return max(evaluations, key=lambda one: one[1], default=None)


def advised_iteration(holdout_evaluations: Sequence[tuple[int, float]], iterations: int) -> int:
    """Return the iteration whose policy to use: the last one, or the best by the held-out reward if there is one.

    0 is the pretrained model.
    """
    best = best_of(list(holdout_evaluations))
    return iterations if best is None else best[0]
