"""The brake: it ends a run whose held-out reward no longer keeps pace with the reward, and says which policy to use.

A learned reward is over-optimised from the moment at which it goes on rising and what it stands for does not. A loss of
a tenth of the gain is smaller than what a policy goes up and down from one evaluation to the next. So the brake does
not wait for a fall. It looks at the slope: over the last four evaluations the held-out reward rose less than half as
fast as on average before, while the reward that is trained on rose. A run is compared with itself, so slow learning is
no sign.

Every comparison is paired. Every evaluation samples the same prompts and seeds, so each held-out sample has a slope of
its own, and the mean over samples is compared with its standard error. Seeds that are easy or hard for every policy do
not widen it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.config.settings import LEAST_EVALUATIONS
from agents.evaluation.evaluate import Evaluation
from agents.evaluation.intervals import is_higher
from agents.training.run import Run, RunListener

Scores = Sequence[npt.NDArray[np.float64]]

WINDOW = 4
"""Evaluations over which the present slope is measured."""
AVERAGED = 2
"""Evaluations whose mean stands for one moment, because single ones go up and down. `LEAST_EVALUATIONS` are these, the
first one, and the `WINDOW`."""
FRACTION = 0.5
"""Of the average slope before, below which the held-out reward has fallen behind."""
CERTAIN = 3.0
"""Standard errors of a fall, and of the reward's rise. Of many evaluations one exceeds two by chance."""


def over_optimisation(holdout: Scores, rewards: Scores) -> str | None:
    """Return what shows at the last evaluation that a run over-optimises; `None` if nothing does.

    It is one of three signs: the held-out reward has fallen below that of the pretrained model; it has fallen within
    the last `WINDOW` evaluations; or it has risen less than `FRACTION` as fast in them as on average before, by more
    than two standard errors, and the reward has risen. A fall and the reward's rise are more than `CERTAIN` standard
    errors. All comparisons are paired.

    Args:
        holdout: scores of the held-out reward at every evaluation from the pretrained model's on, each `(samples,)`,
            of the same prompts and seeds.
        rewards: the same of the reward that is trained on. A sample without a finite score is left out.
    """
    if len(holdout) < LEAST_EVALUATIONS:
        return None
    first = holdout[0]
    earlier, now = (np.mean(scores, axis=0) for scores in (holdout[-WINDOW - AVERAGED : -WINDOW], holdout[-AVERAGED:]))
    if is_higher(first, now, CERTAIN):
        return "it has fallen below that of the pretrained model"
    if is_higher(earlier, now, CERTAIN):
        return f"it has fallen within {WINDOW} evaluations"
    evaluations_before = len(holdout) - 1 - WINDOW - (AVERAGED - 1) / 2
    expected = FRACTION * WINDOW / evaluations_before * (earlier - first)
    if _has_risen(rewards) and is_higher(expected, now - earlier):
        return f"over {WINDOW} evaluations it rose less than half as fast as before, and the reward rose"
    return None


def _has_risen(rewards: Scores) -> bool:
    earlier, now = (np.mean(one, axis=0) for one in (rewards[-WINDOW - AVERAGED : -WINDOW], rewards[-AVERAGED:]))
    finite = np.isfinite(earlier) & np.isfinite(now)
    return finite.sum() > 1 and is_higher(now[finite], earlier[finite], CERTAIN)


class OverOptimisationBrake(RunListener):
    """Ends a run at the first evaluation that shows over-optimisation, as the function `over_optimisation` says.

    The run keeps the policy of the best evaluation in `best/`. If that is the first one, the pretrained model is best.
    """

    def __init__(self) -> None:
        """Begin without an evaluation."""
        self._holdout: list[npt.NDArray[np.float64]] = []
        self._rewards: list[npt.NDArray[np.float64]] = []

    def on_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        """Add the scores of the evaluation, and judge them."""
        assert evaluation.holdout_rewards is not None
        self._holdout.append(evaluation.holdout_rewards)
        self._rewards.append(evaluation.rewards)
        found = over_optimisation(self._holdout, self._rewards)
        if found is None:
            return
        assert run.best_evaluation is not None
        (iteration, best), evaluations = run.best_evaluation, dict(run.evaluations)
        before, at_best, after = (evaluations[one] for one in (run.evaluations[0][0], iteration, run.iteration))
        run.stop(
            f"over-optimisation: the held-out reward was best after iteration {iteration}, {best:.4g}, and is "
            f"{self._holdout[-1].mean():.4g}: {found}. The reward that is trained on went from {before:.4g} to "
            f"{at_best:.4g} at the best evaluation and to {after:.4g}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of every evaluation, for a checkpoint."""
        return {"holdout": self._holdout, "rewards": self._rewards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._holdout = [np.asarray(scores, np.float64) for scores in state["holdout"]]
        self._rewards = [np.asarray(scores, np.float64) for scores in state["rewards"]]
