"""The brake: it ends a run when the held-out reward has fallen below its best, and says which policy to use.

The rule is a paired comparison. Every evaluation samples the same prompts and seeds, so each held-out sample has a
score now and a score at the best evaluation. Their mean difference has a standard error; seeds that are easy or hard
for every policy do not widen it. The held-out reward counts as fallen if the difference is more than two standard
errors. Once can be chance, and the best of several evaluations is a little lucky, so it must happen twice in a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from agents.evaluation.evaluate import Evaluation
from agents.evaluation.intervals import STANDARD_ERRORS, has_fallen
from agents.training.run import Run, RunListener

EVALUATIONS = 2


class OverOptimisationBrake(RunListener):
    """Ends a run after two evaluations in a row at which the held-out reward has fallen (`has_fallen`).

    The run keeps the policy of the best evaluation in `best/`. If that is the first one, the pretrained model is best.
    """

    def __init__(self) -> None:
        """Begin without an evaluation."""
        self._best: npt.NDArray[np.float64] = np.zeros(0)
        self._fallen = 0

    def on_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        """Compare the held-out rewards with the best ones."""
        now = evaluation.holdout_rewards
        assert now is not None
        if not len(self._best) or now.mean() > self._best.mean():
            self._best, self._fallen = now, 0
            return
        self._fallen = self._fallen + 1 if has_fallen(self._best, now) else 0
        if self._fallen < EVALUATIONS:
            return
        assert run.best_evaluation is not None
        best, (_, before), (_, reward) = run.best_evaluation[0], run.evaluations[0], run.evaluations[-1]
        run.stop(
            f"over-optimisation: the held-out reward was best after iteration {best}, {self._best.mean():.4g}, and has "
            f"been more than {STANDARD_ERRORS:g} standard errors lower in the last {EVALUATIONS} evaluations, now "
            f"{now.mean():.4g}; the reward itself went from {before:.4g} to {reward:.4g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best scores and the number of evaluations below them, for a checkpoint."""
        return {"best": self._best, "fallen": self._fallen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._best, self._fallen = np.asarray(state["best"], np.float64), int(state["fallen"])
