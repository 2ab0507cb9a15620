"""Scores of a base model's and a tuned model's images come in; means with intervals, and paired differences, go out.

Both models generate from the same prompts and seeds. Prompts are the independent units: the samples of one prompt are
averaged first. So an interval says what to expect of other prompts of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.intervals import bootstrap_interval, wilson_interval

BASE = 0.0
"""The strength of the LoRA that is the base model."""


@dataclass(frozen=True)
class ScoredImage:
    """One image's place in the evaluation, and its scores.

    Attributes:
        prompt_set: name of the prompt set.
        prompt_index: of the prompt in its set, from 0 on.
        prompt: the text.
        sample: number among the prompt's samples, from 0 on.
        seed: of the noise.
        strength: of the LoRA; `BASE` is the base model.
        scores: by the reward's name.
        details: what the rewards said further, by `reward.detail`.
    """

    prompt_set: str
    prompt_index: int
    prompt: str
    sample: int
    seed: int
    strength: float
    scores: Mapping[str, float]
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, which is `None` if a single value has none."""

    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Result:
    """One reward on one prompt set at one strength.

    Attributes:
        reward: name of the reward.
        prompt_set: name of the prompt set.
        strength: of the LoRA; `BASE` is the base model.
        prompts: their number.
        images: their number.
        is_share: whether all scores of this reward are 0 or 1. The interval of `score` is then Wilson's over images;
            else it is the bootstrap's over prompts.
        score: mean score.
        change: mean difference from the base model's image of the same prompt and seed, with the bootstrap's interval
            over prompts; `None` for the base model.
    """

    reward: str
    prompt_set: str
    strength: float
    prompts: int
    images: int
    is_share: bool
    score: Estimate
    change: Estimate | None


def compare(images: Sequence[ScoredImage]) -> list[Result]:
    """Return the results by reward, prompt set and strength, in the order in which these first occur.

    Args:
        images: every strength has the same prompts and seeds, and `BASE` is one of the strengths.
    """
    rewards = list(images[0].scores)
    sets = list(dict.fromkeys(one.prompt_set for one in images))
    strengths = list(dict.fromkeys(one.strength for one in images))
    results = []
    for reward in rewards:
        is_share = all(one.scores[reward] in (0, 1) for one in images)
        for name in sets:
            scores = {strength: _by_prompt(images, reward, name, strength) for strength in strengths}
            for strength, table in scores.items():
                change = None if strength == BASE else _clustered(table - scores[BASE])
                score = _share(table) if is_share else _clustered(table)
                prompts = len(table)
                results.append(Result(reward, name, strength, prompts, table.size, is_share, score, change))
    return results


def best_strengths(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Return the strength with the highest mean, by reward and prompt set; the weakest of equal ones."""
    best: dict[str, dict[str, Result]] = {}
    for result in sorted(results, key=lambda one: one.strength):
        rival = best.setdefault(result.reward, {}).setdefault(result.prompt_set, result)
        if result.score.mean > rival.score.mean:
            best[result.reward][result.prompt_set] = result
    return {reward: {name: one.strength for name, one in sets.items()} for reward, sets in best.items()}


def _by_prompt(images: Sequence[ScoredImage], reward: str, name: str, strength: float) -> NDArray[np.float64]:
    """Return scores, `(prompts, samples)`."""
    chosen = [one for one in images if one.prompt_set == name and one.strength == strength]
    chosen.sort(key=lambda one: (one.prompt_index, one.sample))
    scores = np.array([one.scores[reward] for one in chosen], dtype=np.float64)
    return scores.reshape(chosen[-1].prompt_index + 1, -1)


def _clustered(table: NDArray[np.float64]) -> Estimate:
    """Resample prompts; of a single prompt, its samples."""
    units = table.mean(axis=1) if len(table) > 1 else table[0]
    return Estimate(float(table.mean()), bootstrap_interval(units))


def _share(table: NDArray[np.float64]) -> Estimate:
    return Estimate(float(table.mean()), wilson_interval(int(table.sum()), table.size))
