"""The brake: it ends a run whose held-out reward no longer keeps pace with the reward, and says which policy to use.

A learned reward is over-optimised from the moment at which it goes on rising and what it stands for does not. There are
two signs, one for a sudden turn and one for a slow one. The held-out reward falls, compared with the best evaluation.
Or it falls behind: over the last four evaluations it rose less than half as fast as on average before, while the reward
that is trained on rose. A run is compared with itself, so slow learning is no sign.

A comparison of evaluations has two sources of chance. The first is the choice of samples. Every evaluation samples the
same prompts and seeds, so scores are compared sample by sample, and seeds that are easy or hard for every policy do not
widen the standard error. The second is the policy, whose scores go up and down from one evaluation to the next. This
is estimated from how far the curve is from a smooth one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.config.settings import LEAST_EVALUATIONS
from agents.evaluation.evaluate import Evaluation
from agents.evaluation.intervals import STANDARD_ERRORS, is_higher, paired_difference
from agents.training.run import Run, RunListener

Scores = Sequence[npt.NDArray[np.float64]]

WINDOW = 4
"""Evaluations over which the present slope is measured."""
AVERAGED = 2
"""Evaluations whose mean stands for one moment, because single ones go up and down. `LEAST_EVALUATIONS` are these, the
first one, and the `WINDOW`."""
FRACTION = 0.5
"""The held-out reward has fallen behind when its slope is below this fraction of its average slope before."""
CERTAIN = 3.0
"""A fall, or the reward's rise, must exceed this many standard errors. With many evaluations, one of them exceeds two
by chance."""


def over_optimisation(holdout: Scores, rewards: Scores) -> str | None:
    """Return what shows at the last evaluation that a run over-optimises; `None` if nothing does.

    It is one of two signs. The held-out reward is below its best evaluation. Or it has risen less than `FRACTION` as
    fast in the last `WINDOW` evaluations as on average before, and the reward has risen.

    Args:
        holdout: scores of the held-out reward at every evaluation from the pretrained model's on, each `(samples,)`,
            of the same prompts and seeds.
        rewards: the same of the reward that is trained on. A sample without a finite score is left out.
    """
    if len(holdout) < LEAST_EVALUATIONS:
        return None
    means = np.mean(holdout, axis=1)
    best, policies = int(np.argmax(means)), _noise_of_policies(means[:-1])
    fallen, error = paired_difference(holdout[-1], holdout[best])
    if fallen > CERTAIN * math.hypot(error, math.sqrt(2) * policies):
        return "it has fallen by more than evaluations differ by chance"
    first, earlier, now = holdout[0], _at(holdout, -WINDOW), _at(holdout, 0)
    evaluations_before = len(holdout) - 1 - WINDOW - (AVERAGED - 1) / 2
    expected = FRACTION * WINDOW / evaluations_before * (earlier - first)
    behind, error = paired_difference(now - earlier, expected)
    if _has_risen(rewards) and behind > STANDARD_ERRORS * math.hypot(error, policies):
        return f"over {WINDOW} evaluations it rose less than half as fast as before, and the reward rose"
    return None


def _at(scores: Scores, place: int) -> npt.NDArray[np.float64]:
    """Return the mean scores of the `AVERAGED` evaluations until a place; 0: the last one."""
    end = len(scores) + place
    return np.asarray(np.mean(scores[end - AVERAGED : end], axis=0))


def _noise_of_policies(means: npt.NDArray[np.float64]) -> float:
    """Return by how much an evaluation's mean differs from a smooth curve, as a standard deviation.

    A second difference of independent errors has √6 times their standard deviation, and of a smooth curve it is small.
    The median is not moved by one sharp turn. 0.6745 makes it a standard deviation of normal errors.
    """
    return float(np.median(np.abs(np.diff(means, 2)))) / (0.6745 * math.sqrt(6))


def _has_risen(rewards: Scores) -> bool:
    earlier, now = _at(rewards, -WINDOW), _at(rewards, 0)
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
