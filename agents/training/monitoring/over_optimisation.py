"""The brake: it ends a run whose held-out reward no longer rises, and says which policy to use.

A learned reward is over-optimised from the moment at which it goes on rising and what it stands for does not; long
before that has fallen measurably. So the run ends after three evaluations without a new best of the held-out reward, if
in this time the reward that is trained on has risen, or the held-out one has fallen. Both are paired comparisons. Every
evaluation samples the same prompts and seeds, so each held-out sample has a score now and a score at the best
evaluation. Their mean difference must be more than two of its standard errors; seeds that are easy or hard for every
policy do not widen those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from agents.evaluation.evaluate import Evaluation
from agents.evaluation.intervals import STANDARD_ERRORS, is_higher
from agents.training.run import Run, RunListener

EVALUATIONS = 3


class OverOptimisationBrake(RunListener):
    """Ends a run after three evaluations without a better held-out reward, while the reward rises or it falls itself.

    The run keeps the policy of the best evaluation in `best/`. If that is the first one, the pretrained model is best.
    """

    def __init__(self) -> None:
        """Begin without an evaluation."""
        self._best: npt.NDArray[np.float64] = np.zeros(0)
        self._reward_at_best: npt.NDArray[np.float64] = np.zeros(0)
        self._waited = 0

    def on_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        """Compare both rewards with those of the best evaluation."""
        holdout, reward = evaluation.holdout_rewards, evaluation.finite_rewards()
        assert holdout is not None
        if not len(self._best) or holdout.mean() > self._best.mean():
            self._best, self._reward_at_best, self._waited = holdout, reward, 0
            return
        self._waited += 1
        if self._waited < EVALUATIONS:
            return
        has_fallen, has_risen = is_higher(self._best, holdout), is_higher(reward, self._reward_at_best)
        if not (has_fallen or has_risen):
            return
        assert run.best_evaluation is not None
        best, (_, before), (_, after) = run.best_evaluation[0], run.evaluations[0], run.evaluations[-1]
        fallen = f", which is more than {STANDARD_ERRORS:g} standard errors lower" if has_fallen else ""
        run.stop(
            f"over-optimisation: the held-out reward was best after iteration {best}, {self._best.mean():.4g}, and no "
            f"evaluation of the {self._waited} since was better; it is now {holdout.mean():.4g}{fallen}. The reward "
            f"that is trained on went from {before:.4g} to {self._reward_at_best.mean():.4g} and then to {after:.4g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the scores at the best evaluation and the number of evaluations since, for a checkpoint."""
        return {"best": self._best, "reward_at_best": self._reward_at_best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._best = np.asarray(state["best"], np.float64)
        self._reward_at_best = np.asarray(state["reward_at_best"], np.float64)
        self._waited = int(state["waited"])
