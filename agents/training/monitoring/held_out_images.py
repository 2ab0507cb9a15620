"""Images of the same prompts and held-out seeds before, during and after training, with their mean reward."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.logger import Image as LoggedImage

from agents.evaluation.comparison_report import read_text
from agents.evaluation.evaluate import Evaluation, evaluate, evaluation_prompts
from agents.evaluation.image_grid import image_grid, read_strip, write_image, write_strip
from agents.evaluation.pretrained_comparison import chosen_transitions
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.report.evaluation_files import SHOWN, evaluation_name, read_evaluation, write_evaluation
from agents.report.sample_files import write_samples
from agents.training.monitoring.holdout_reward import HoldoutReward
from agents.training.run import Run, RunListener
from ddpo_env.models.protocol import abilities_of
from ddpo_env.prompts import Prompt
from ddpo_env.vector_env import DenoisingVectorEnv


class HeldOutImages(RunListener):
    """Generates and scores the same held-out samples before training, every few iterations, and after it.

    It writes `samples/iteration_NNNN.png` and its images alone, logs the mean reward as `eval/reward_mean` and the grid
    to TensorBoard, and at the end writes `samples/before_after.png`, in which a judge's descriptions are beneath the
    images. There are no such files for a model whose samples are no images and which does not render them. What was
    scored is in `samples/images/iteration_NNNN.json`, with the shown videos and sounds beside it. Where the environment
    keeps rewards that are NaN or infinite, the mean is that of the others, and `eval/dropped_samples` is their number.
    Each prompt occurs at least twice, so that samples of the same prompt can be compared.

    Args:
        env: for the held-out episodes; autoreset off.
        samples: number of samples that are scored; the first nine are shown.
        interval: iterations between evaluations; 0 for before and after only.
        seed: of the first held-out sample.
        window: the steps that the run trains on, as fractions of them, at which the policy is compared with the
            pretrained one.
        holdout: scores the samples too, in the main process.
        stochastic: which steps have noise, `(steps,)`; default: all.
    """

    def __init__(
        self,
        env: DenoisingVectorEnv,
        samples: int,
        interval: int,
        seed: int,
        window: tuple[float, float] = (0.0, 1.0),
        holdout: HoldoutReward | None = None,
        stochastic: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Choose the prompts; see the class docstring for the arguments."""
        self.env = env
        self.interval = interval
        self.seed = seed
        self.holdout = holdout
        self.prompts = _repeated(evaluation_prompts(env, samples, seed))
        self.compared = chosen_transitions(samples, env.num_inference_steps, window, stochastic)
        self.columns = min(SHOWN, samples)
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
        """Return the mean rewards of the grids and the state of the held-out reward, for a checkpoint.

        The images are in the run's folder.
        """
        return {"shown": self._shown, "holdout": self.holdout.state_dict() if self.holdout is not None else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._shown = [(iteration, mean) for iteration, mean in state["shown"]]
        if self.holdout is not None:
            self.holdout.load_state_dict(state["holdout"])

    def _evaluate(self, run: Run) -> None:
        algorithm = run.algorithm
        assert isinstance(algorithm.policy, DiffusionPolicy)
        began = perf_counter()
        with algorithm.averaged_weights():
            evaluation = evaluate(
                algorithm.policy, self.env, self.prompts, self.seed, run.processes, compared=self.compared
            )
        with run.processes.fail_together():
            rewards = evaluation.finite_rewards()
        if self.holdout is not None:
            holdout, samples = self.holdout, evaluation.images
            scores = run.processes.from_main(lambda: holdout(samples, self.prompts))
            evaluation = replace(evaluation, holdout_rewards=scores)
            algorithm.logger.record("eval/holdout_reward_mean", float(scores.mean()))
            algorithm.logger.record("eval/holdout_reward_std", float(scores.std()))
        algorithm.logger.record("eval/reward_mean", float(rewards.mean()))
        algorithm.logger.record("eval/reward_std", float(rewards.std()))
        run.record_evaluation(evaluation)
        if self.env.non_finite_rewards == "keep":
            algorithm.logger.record("eval/dropped_samples", evaluation.dropped_samples)
        shown = _finite_mean(evaluation.rewards[: self.columns])
        self._shown.append((run.iteration, shown))
        run.processes.from_main(lambda: self._write_samples(run, evaluation))
        pictures = evaluation.pictures
        if pictures is not None:
            run.processes.from_main(lambda: self._write(run, pictures[: self.columns], shown))
        algorithm.logger.record("time/evaluation", perf_counter() - began)

    def _write_samples(self, run: Run, evaluation: Evaluation) -> None:
        rate = abilities_of(self.env.model).sample_metadata.get("sampling_rate")
        name = evaluation_name(run.iteration)
        write_evaluation(run.folder.images / f"{name}.json", evaluation, run.iteration, self.columns)
        write_samples(run.folder.images, name, evaluation.images[: self.columns], rate)

    def _write(self, run: Run, images: npt.NDArray[Any], shown: float) -> None:
        write_strip(_strip(run, run.iteration), images)
        grid = image_grid([images], [f"iteration {run.iteration}\n{self._mean(shown)}"], self._headings)
        write_image(run.folder.samples / f"{evaluation_name(run.iteration)}.png", grid)
        pixels = torch.as_tensor(np.array(grid)).permute(2, 0, 1)
        run.algorithm.logger.record("samples", LoggedImage(pixels, "CHW"), exclude=("stdout", "csv"))

    def _draw_run(self, run: Run) -> None:
        middle = self._shown[len(self._shown) // 2]
        chosen = {"before": self._shown[0], "during": middle, "after": self._shown[-1]}
        if len(self._shown) < 3:
            del chosen["during"]
        # Read back, because a resumed run did not generate its first images itself; somebody may have deleted them.
        chosen = {name: one for name, one in chosen.items() if _strip(run, one[0]).is_file()}
        if not chosen:
            return
        labels = [
            f"{name}\niteration {iteration}\n{self._mean(reward)}" for name, (iteration, reward) in chosen.items()
        ]
        rows = [read_strip(_strip(run, iteration), self.columns) for iteration, _ in chosen.values()]
        texts = [self._texts(run, iteration) for iteration, _ in chosen.values()]
        captions = texts if any(map(any, texts)) else ()
        write_image(run.folder.samples / "before_after.png", image_grid(rows, labels, self._headings, captions))

    def _mean(self, reward: float) -> str:
        """Say the mean reward of the samples that are shown; that of all samples is another one."""
        return f"mean of {self.columns}\n{reward:.2f}"

    def _texts(self, run: Run, iteration: int) -> list[str]:
        """Return what a judge said of each sample that is shown, as far as its record is still there."""
        file = run.folder.images / f"{evaluation_name(iteration)}.json"
        details = read_evaluation(file).details if file.is_file() else {}
        return [read_text({name: values[place] for name, values in details.items()}) for place in range(self.columns)]

    @property
    def _headings(self) -> list[str]:
        return [prompt for prompt, _ in self.prompts[: self.columns]]


def _repeated(prompts: list[Prompt]) -> list[Prompt]:
    """Return prompts of which each occurs at least twice if there are two, so that its samples can be compared."""
    half = max(1, len(prompts) // 2)
    repeats = len({text for text, _ in prompts}) <= half
    return prompts if repeats else (prompts[:half] * 3)[: len(prompts)]


def _strip(run: Run, iteration: int) -> Path:
    return run.folder.images / f"{evaluation_name(iteration)}.png"


def _finite_mean(rewards: npt.NDArray[np.float64]) -> float:
    """Return the mean of the finite rewards; NaN if there are none."""
    finite = rewards[np.isfinite(rewards)]
    return float(finite.mean()) if len(finite) else math.nan
