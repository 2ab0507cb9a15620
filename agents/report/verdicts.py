"""What the monitors of over-optimisation show, in words.

Rewards are compared sample by sample, as `--stop-at-overoptimisation` compares them (`is_higher`). The limits of the
other monitors are rules of thumb, which say where to look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from agents.evaluation.intervals import STANDARD_ERRORS, is_higher, paired_difference
from agents.report.evaluation_files import EvaluationRecord
from agents.report.run_data import Curve, RunData

Level = Literal["good", "watch", "bad", "unknown"]
LEVELS: tuple[Level, ...] = ("unknown", "good", "watch", "bad")
"""The levels, from the least worrying one to the most worrying one."""
_VOTES = "votes"
_Scores = Callable[[EvaluationRecord], Any]

NORM_RATIO = (0.1, 0.3)
DIVERSITY_LOSS = (0.25, 0.5)
GRID_GROWTH = (2.0, 4.0)
"""Limits of `watch` and `bad`: deviation of the norm ratio from 1, lost fraction of the diversity, factor of the grid
energy."""


@dataclass(frozen=True)
class Verdict:
    """What one monitor says.

    Attributes:
        name: of what is watched.
        level: `good`: as it should be. `watch`: look at the images. `bad`: the policy is worse than an earlier one, by
            this measure. `unknown`: there is nothing to judge.
        words: what it means.
        curve: the monitor at every evaluation.
    """

    name: str
    level: Level
    words: str
    curve: Curve


def verdicts(run: RunData) -> list[Verdict]:
    """Return what the monitors of a run say; none before its second evaluation."""
    if len(run.curve("eval/reward_mean")) < 2:
        return []
    found = [_reward(run), _holdout(run), _divergence(run), _norm_ratio(run), _diversity(run), _grid(run)]
    return [one for one in found if one is not None]


def headline(run: RunData, found: Sequence[Verdict]) -> tuple[Level, str]:
    """Return the level and the sentence that stand for all verdicts of a run."""
    if not found:
        return "unknown", "There is no second evaluation to compare with the first one yet."
    by_name = {one.name: one for one in found}
    reward, holdout = by_name["Reward"], by_name["Held-out reward"]
    if reward.level == "good" and holdout.level == "bad":
        return "bad", "Over-optimised: the reward rose while the held-out reward fell."
    worst = max(found, key=lambda one: LEVELS.index(one.level))
    if worst.level in ("watch", "bad"):
        names = [one.name.lower() for one in found if one.level in ("watch", "bad")]
        return worst.level, f"Look at: {', '.join(names)}."
    if reward.level == "unknown":
        return "unknown", "The scale of the reward moves while it learns, so its curve is no improvement."
    if holdout.level == "unknown":
        return "unknown", "The reward rose. Without a held-out reward, nothing says whether the samples became better."
    return "good", "No sign of over-optimisation."


def _reward(run: RunData) -> Verdict:
    means = run.curve("eval/reward_mean")
    if _VOTES in {term.partition(":")[0] for term in str(run.settings.get("reward")).split(",")}:
        words = "The judge that scores held-out samples learns from the votes, so its scores of two evaluations differ."
        return Verdict("Reward", "unknown", f"{words} Watch a held-out reward.", means)
    pair = _pair(run, lambda record: record.rewards, means[0][0], means[-1][0])
    change = means[-1][1] - means[0][1]
    words = f"from {number(means[0][1])} to {number(means[-1][1])} on the same prompts and seeds"
    if pair is None:
        level: Level = "good" if change > 0 else "watch"
        return Verdict("Reward", level, f"The mean reward went {words}.", means)
    mean, error = paired_difference(*pair)
    sign, margin = ("+" if mean > 0 else ""), f"{STANDARD_ERRORS * error:.2g}"
    words += f" ({sign}{number(mean, 3)} ± {margin}, two standard errors of the paired difference)."
    if abs(mean) <= STANDARD_ERRORS * error:
        return Verdict("Reward", "watch", f"The mean reward has not measurably changed: {words}", means)
    level, verb = ("good", "rose") if mean > 0 else ("bad", "fell")
    return Verdict("Reward", level, f"The mean reward {verb} {words}", means)


def _holdout(run: RunData) -> Verdict:
    means, name = run.curve("eval/holdout_reward_mean"), "Held-out reward"
    if not means:
        words = "No second reward watched the samples. Give --holdout-reward a reward that sees other things."
        return Verdict(name, "unknown", words, [])
    best = max(means, key=lambda one: one[1])
    at_best = f"{number(best[1])} {_after(best[0])}"
    if best == means[-1]:
        return Verdict(name, "good", f"It is at its best now: {at_best}.", means)
    fallen = [_fell(run, best[0], iteration) for iteration, _ in means[-2:]]
    words = f"It was best, {at_best}, and is {number(means[-1][1])} now."
    if not fallen[-1]:
        return Verdict(name, "good", f"{words} The difference is within two standard errors.", means)
    use = "the pretrained model" if best[0] == 0 else "the policy in best/"
    if len(means) > 2 and all(fallen):
        words = f"{words} It fell by more than two standard errors, twice in a row. Use {use}."
        return Verdict(name, "bad", words, means)
    return Verdict(name, "watch", f"{words} It fell by more than two standard errors once, which can be chance.", means)


def _fell(run: RunData, best: int, now: int) -> bool:
    """Compare pairs of samples; of a run of an older version only means and deviations, which shows less."""
    if best == now:
        return False
    pair = _pair(run, lambda record: record.holdout_rewards, best, now)
    if pair is not None:
        return is_higher(pair[0], pair[1])
    means, deviations = dict(run.curve("eval/holdout_reward_mean")), dict(run.curve("eval/holdout_reward_std"))
    error = math.hypot(deviations[best], deviations[now]) / math.sqrt(max(1, run.count("eval_samples")))
    return means[best] - means[now] > STANDARD_ERRORS * error


def _divergence(run: RunData) -> Verdict | None:
    values = run.curve("eval/kl_to_pretrained")
    if len(values) < 2:
        return None
    unit = "nats" if run.settings.get("log_prob_reduction") == "sum" else "nats per dimension"
    words = f"The policy is {number(values[-1][1])} {unit} from the pretrained one"
    middle, last = values[len(values) // 2 - (len(values) == 2)], values[-1]
    pair = _pair(run, lambda record: record.rewards, middle[0], last[0])
    if pair is not None and last[1] > middle[1]:
        mean, error = paired_difference(*pair)
        if mean <= STANDARD_ERRORS * error:
            words += f". Since iteration {middle[0]} it went further, and the reward has not measurably risen."
            return Verdict("Distance from the pretrained model", "watch", words, values)
        words += f", and since iteration {middle[0]} the reward rose with the distance"
    return Verdict("Distance from the pretrained model", "good", f"{words}.", values)


def _norm_ratio(run: RunData) -> Verdict | None:
    values = run.curve("eval/output_norm_ratio")
    if not values:
        return None
    level = _graded(abs(values[-1][1] - 1), NORM_RATIO)
    words = f"The denoiser's output has {values[-1][1]:.2f} times the norm of the pretrained one's"
    ending = "." if level == "good" else ", which is far from 1: images may look burnt or grey."
    return Verdict("Output norm", level, words + ending, values)


def _diversity(run: RunData) -> Verdict | None:
    values = run.curve("eval/diversity")
    if len(values) < 2 or values[0][1] <= 0:
        return None
    kept = values[-1][1] / values[0][1]
    level = _graded(1 - kept, DIVERSITY_LOSS)
    words = f"Samples of the same prompt differ {kept:.0%} as much as before training"
    ending = "." if level == "good" else ": they become alike."
    return Verdict("Diversity", level, words + ending, values)


def _grid(run: RunData) -> Verdict | None:
    values = run.curve("eval/grid_energy")
    if len(values) < 2 or values[0][1] <= 0:
        return None
    factor = values[-1][1] / values[0][1]
    level = _graded(factor, GRID_GROWTH)
    words = f"The pattern of the latent grid has {factor:.1f} times the energy that it had before training"
    ending = "." if level == "good" else ": look for a checkerboard."
    return Verdict("Grid pattern", level, words + ending, values)


def _pair(run: RunData, scores: _Scores, first: int, last: int) -> tuple[npt.NDArray[np.float64], ...] | None:
    """Return the scores of the same samples at two evaluations, where both are finite; `None` if fewer than two are."""
    if first not in run.records or last not in run.records:
        return None
    one, other = run.records[first], run.records[last]
    before, after = scores(one), scores(other)
    if before is None or after is None or list(one.prompts) != list(other.prompts):
        return None
    both = np.isfinite(before) & np.isfinite(after)
    return (before[both], after[both]) if both.sum() >= 2 else None


def _graded(value: float, limits: tuple[float, float]) -> Level:
    if value > limits[1]:
        return "bad"
    return "watch" if value > limits[0] else "good"


def _after(iteration: int) -> str:
    return "before training" if iteration == 0 else f"after iteration {iteration}"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number for people, with at most so many digits that count; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}".replace("-", "−")
