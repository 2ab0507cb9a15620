"""Images of the same prompts and held-out seeds before, during and after training, with their mean reward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.logger import Image as LoggedImage

from agents.evaluation.evaluate import evaluate, evaluation_prompts
from agents.evaluation.image_grid import image_grid, read_strip, write_image, write_strip
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.training.run import Run, RunListener
from ddpo_env.models.protocol import abilities_of
from ddpo_env.vector_env import DenoisingVectorEnv

_COLUMNS = 9


class HeldOutImages(RunListener):
    """Generates and scores the same held-out samples before training, every few iterations, and after it.

    It writes `samples/iteration_NNNN.png` and its images alone, logs the mean reward as `eval/reward_mean` and the grid
    to TensorBoard, and at the end writes `samples/before_after.png`. There are no files
    for a model whose samples are no images and which does not render them. Where the environment keeps rewards that are
    NaN or infinite, the mean is that of the others, and `eval/dropped_samples` is their number.

    Args:
        env: for the held-out episodes; autoreset off.
        samples: number of samples that are scored; the first nine are shown.
        interval: iterations between evaluations; 0 for before and after only.
        seed: of the first held-out sample.
    """

    def __init__(self, env: DenoisingVectorEnv, samples: int, interval: int, seed: int) -> None:
        """Choose the prompts; see the class docstring for the arguments."""
        self.env = env
        self.interval = interval
        self.seed = seed
        self.prompts = evaluation_prompts(env, samples, seed)
        self.columns = min(_COLUMNS, samples)
        self._draws = abilities_of(env.model).can_render
        self._shown: list[tuple[int, float]] = []

    def on_start(self, run: Run) -> None:
        """Evaluate the pretrained policy; also a run that a resumption ends sooner than it was planned."""
        if not run.evaluations or (run.is_finished and run.evaluations[-1][0] != run.iteration):
            self._evaluate(run)

    def on_iteration(self, run: Run) -> None:
        """Evaluate if it is due, and always after the last iteration."""
        if run.is_finished or (self.interval and run.iteration % self.interval == 0):
            self._evaluate(run)

    def on_end(self, run: Run) -> None:
        """Write the grid of the whole run."""
        if self._draws:
            run.processes.from_main(lambda: self._draw_run(run))

    def state_dict(self) -> dict[str, Any]:
        """Return the mean rewards of the grids, for a checkpoint; the images are in the run's folder."""
        return {"shown": self._shown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._shown = [(iteration, mean) for iteration, mean in state["shown"]]

    def _evaluate(self, run: Run) -> None:
        algorithm = run.algorithm
        assert isinstance(algorithm.policy, DiffusionPolicy)
        with algorithm.averaged_weights():
            evaluation = evaluate(algorithm.policy, self.env, self.prompts, self.seed, run.processes)
        with run.processes.fail_together():
            rewards = evaluation.finite_rewards()
        run.record_evaluation(float(rewards.mean()), float(rewards.std()))
        algorithm.logger.record("eval/reward_mean", float(rewards.mean()))
        algorithm.logger.record("eval/reward_std", float(rewards.std()))
        if self.env.non_finite_rewards == "keep":
            algorithm.logger.record("eval/dropped_samples", evaluation.dropped_samples)
        shown = _finite_mean(evaluation.rewards[: self.columns])
        self._shown.append((run.iteration, shown))
        pictures = evaluation.pictures
        if pictures is not None:
            run.processes.from_main(lambda: self._write(run, pictures[: self.columns], shown))

    def _write(self, run: Run, images: npt.NDArray[Any], shown: float) -> None:
        write_strip(_strip(run, run.iteration), images)
        grid = image_grid([images], [f"iteration {run.iteration}\n{shown:.2f}"], self._captions)
        write_image(run.folder.samples / f"iteration_{run.iteration:04d}.png", grid)
        pixels = torch.as_tensor(np.array(grid)).permute(2, 0, 1)
        run.algorithm.logger.record("samples", LoggedImage(pixels, "CHW"), exclude=("stdout", "csv"))

    def _draw_run(self, run: Run) -> None:
        middle = self._shown[len(self._shown) // 2]
        chosen = {"before": self._shown[0], "during": middle, "after": self._shown[-1]}
        if len(self._shown) < 3:
            del chosen["during"]
        labels = [f"{name}\niteration {iteration}\n{reward:.2f}" for name, (iteration, reward) in chosen.items()]
        # Read back, because a resumed run did not generate its first images itself.
        rows = [read_strip(_strip(run, iteration), self.columns) for iteration, _ in chosen.values()]
        write_image(run.folder.samples / "before_after.png", image_grid(rows, labels, self._captions))

    @property
    def _captions(self) -> list[str]:
        return [prompt for prompt, _ in self.prompts[: self.columns]]


def _strip(run: Run, iteration: int) -> Path:
    return run.folder.images / f"iteration_{iteration:04d}.png"


def _finite_mean(rewards: npt.NDArray[np.float64]) -> float:
    """Return the mean of the finite rewards; NaN if there are none."""
    finite = rewards[np.isfinite(rewards)]
    return float(finite.mean()) if len(finite) else math.nan
