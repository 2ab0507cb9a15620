"""What is measured on the held-out samples of every evaluation, to see a policy leave what the pretrained model knows.

Nothing is generated for it: the samples are those of the evaluation. A few of their transitions go through the denoiser
twice more, with and without what was learned.
"""

from __future__ import annotations

import math
from typing import Any

from agents.evaluation.evaluate import Evaluation
from agents.evaluation.plots import reward_against_kl
from agents.evaluation.sample_measures import grid_energy, grid_period, prompt_diversity
from agents.training.run import Run, RunListener
from ddpo_env.models import DiffusionModel


class Monitors(RunListener):
    """Logs what an evaluation shows beside its reward, and plots the reward against the KL divergence at the end.

    `eval/kl_to_pretrained`, `eval/output_norm_ratio`, `eval/diversity` and `eval/grid_energy`, see
    `agents.evaluation.pretrained_comparison` and `agents.evaluation.sample_measures`. One that cannot be measured, such
    as the grid energy of sounds, has no column.
    """

    def __init__(self, model: DiffusionModel) -> None:
        """Take the model, whose latents have a grid or not."""
        self._latent_shape = model.latent_shape
        self._divergences: list[tuple[int, float]] = []

    def on_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        """Measure and log.

        Raises:
            FloatingPointError: for a measure that is NaN or infinite.
        """
        for name, value in self.measures(evaluation).items():
            if not math.isfinite(value):
                error = FloatingPointError(f"eval/{name} is {value} after iteration {run.iteration}")
                raise run.processes.mark_agreed(error)
            run.algorithm.logger.record(f"eval/{name}", value)
            if name == "kl_to_pretrained":
                self._divergences.append((run.iteration, value))

    def measures(self, evaluation: Evaluation) -> dict[str, float]:
        """Return the measures of an evaluation by name."""
        values: dict[str, float | None] = {"diversity": prompt_diversity(evaluation.images, evaluation.prompts)}
        if evaluation.comparison is not None:
            values["kl_to_pretrained"] = evaluation.comparison.mean_kl
            values["output_norm_ratio"] = evaluation.comparison.norm_ratio
        period = grid_period(evaluation.images.shape[1:], self._latent_shape)
        if period is not None:
            values["grid_energy"] = grid_energy(evaluation.images, period)
        return {name: value for name, value in values.items() if value is not None}

    def on_end(self, run: Run) -> None:
        """Draw `reward_against_kl.png`, unless no step has noise, and so no divergence."""
        if not self._divergences:
            return
        curves = {run.config.reward: [mean for _, mean in run.evaluations]}
        if run.holdout_evaluations:
            curves[f"{run.config.run.holdout_reward} (held out)"] = [mean for _, mean in run.holdout_evaluations]
        iterations, divergences = zip(*self._divergences, strict=True)
        unit = "nats per dimension" if run.config.policy.log_prob_reduction == "mean" else "nats"
        path = run.folder.path / "reward_against_kl.png"
        run.processes.from_main(lambda: reward_against_kl(path, divergences, curves, iterations, unit))

    def state_dict(self) -> dict[str, Any]:
        """Return the divergences so far, for a checkpoint."""
        return {"divergences": self._divergences}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._divergences = [(iteration, value) for iteration, value in state["divergences"]]
