"""What happens beside training: held-out pictures before, during and after."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Image as LoggedImage

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.evaluation.evaluate import evaluate, evaluation_prompts
from agents.evaluation.image_grid import picture_grid, read_strip, reward_curve, write_strip
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.training.run_folder import RunFolder
from ddpo_env.vector_env import DenoisingVectorEnv


class HeldOutPictures(BaseCallback):
    """Draws and scores the same prompts from the same held-out seeds, before training and every few iterations.

    Writes `samples/iteration_NNNN.png` and the pictures in it alone, logs the mean reward as `eval/reward_mean` and the
    grid to TensorBoard, and at the end writes `samples/before_after.png` and `reward.png`. Where the environment keeps
    rewards that are NaN or infinite, the mean is that of the others, and `eval/dropped_samples` is their number.

    Args:
        env: for the held-out episodes; autoreset off.
        folder: of the run.
        samples: pictures that are scored.
        columns: how many of them are shown in a grid.
        interval: iterations between evaluations; 0 for before and after only.
        seed: of the first held-out picture.
        reward_name: for the curve.
    """

    def __init__(
        self,
        env: DenoisingVectorEnv,
        folder: RunFolder,
        samples: int,
        columns: int,
        interval: int,
        seed: int,
        reward_name: str,
    ) -> None:
        """See the class docstring for the arguments."""
        super().__init__()
        self.env = env
        self.folder = folder
        self.interval = interval
        self.seed = seed
        self.reward_name = reward_name
        self.prompts = evaluation_prompts(env, samples, seed)
        self.columns = min(columns, samples)
        self.iteration = 0
        self.training_rewards: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self._shown: list[tuple[int, float]] = []

    @property
    def policy(self) -> DiffusionPolicy:
        """What draws."""
        assert isinstance(self.model.policy, DiffusionPolicy)
        return self.model.policy

    def _on_training_start(self) -> None:
        if not self.evaluations:
            self._evaluate()

    def _on_rollout_start(self) -> None:
        if self.interval and self.iteration % self.interval == 0 and self.evaluations[-1][0] != self.iteration:
            self._evaluate()

    def _on_rollout_end(self) -> None:
        self.iteration += 1
        self.training_rewards.append(float(self.model.rollout_buffer.segment_returns().mean()))  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True

    def finish(self) -> float:
        """Draw and score the held-out pictures once more, and write the pictures of the whole run.

        Returns:
            The mean reward after training.
        """
        self._evaluate()
        assert isinstance(self.model, TensorOnPolicyAlgorithm)
        self.model.processes.from_main(self._draw_run)
        return self.evaluations[-1][1]

    def _draw_run(self) -> None:
        middle = self._shown[len(self._shown) // 2]
        chosen = {"before": self._shown[0], "during": middle, "after": self._shown[-1]}
        if len(self._shown) < 3:
            del chosen["during"]
        labels = [f"{name}\niteration {iteration}\n{reward:.2f}" for name, (iteration, reward) in chosen.items()]
        # Read back rather than kept: a resumed run has not drawn its first pictures itself.
        rows = [read_strip(self._strip(iteration), self.columns) for iteration, _ in chosen.values()]
        picture_grid(rows, labels, self._captions).save(self.folder.samples / "before_after.png")
        reward_curve(self.folder.path / "reward.png", self.training_rewards, self.evaluations, self.reward_name)

    def state_dict(self) -> dict[str, Any]:
        """Return the curve so far, for a checkpoint; the pictures are in the run's folder."""
        return {
            "iteration": self.iteration,
            "training_rewards": self.training_rewards,
            "evaluations": self.evaluations,
            "shown": self._shown,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the curve that `state_dict` returned."""
        self.iteration = state["iteration"]
        self.training_rewards = list(state["training_rewards"])
        self.evaluations = [(iteration, mean) for iteration, mean in state["evaluations"]]
        self._shown = [(iteration, mean) for iteration, mean in state["shown"]]

    @property
    def _captions(self) -> list[str]:
        return [prompt for prompt, _ in self.prompts[: self.columns]]

    def _strip(self, iteration: int) -> Path:
        return self.folder.pictures / f"iteration_{iteration:04d}.png"

    def _evaluate(self) -> None:
        assert isinstance(self.model, TensorOnPolicyAlgorithm)
        with self.model.averaged_weights():
            evaluation = evaluate(self.policy, self.env, self.prompts, self.seed, self.model.processes)
        with self.model.processes.agreement():
            rewards = evaluation.finite_rewards()
        mean = float(rewards.mean())
        self.evaluations.append((self.iteration, mean))
        self.logger.record("eval/reward_mean", mean)
        self.logger.record("eval/reward_std", float(rewards.std()))
        if self.env.non_finite_rewards == "keep":
            self.logger.record("eval/dropped_samples", evaluation.dropped_samples)
        images = evaluation.images[: self.columns]
        shown = _finite_mean(evaluation.rewards[: self.columns])
        self._shown.append((self.iteration, shown))
        self.model.processes.from_main(lambda: self._write(images, shown))

    def _write(self, images: npt.NDArray[Any], shown: float) -> None:
        write_strip(self._strip(self.iteration), images)
        sheet = picture_grid([images], [f"iteration {self.iteration}\n{shown:.2f}"], self._captions)
        sheet.save(self.folder.samples / f"iteration_{self.iteration:04d}.png")
        pixels = torch.as_tensor(np.array(sheet)).permute(2, 0, 1)
        self.logger.record("samples", LoggedImage(pixels, "CHW"), exclude=("stdout", "csv"))


def _finite_mean(rewards: npt.NDArray[np.float64]) -> float:
    """Mean of the finite ones; NaN if there are none."""
    finite = rewards[np.isfinite(rewards)]
    return float(finite.mean()) if len(finite) else math.nan
