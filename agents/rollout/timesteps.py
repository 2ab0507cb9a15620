"""The steps of a rollout that an update trains on, and on how many of them its effect is measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt


def choose_steps(
    segments: npt.NDArray[np.int64],
    fraction: float,
    window: tuple[float, float],
    rng: np.random.Generator,
    scored: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int64]:
    """Draw `fraction` of each episode's steps, at least one, from those inside `window` that are scored.

    Args:
        segments: number of the episode, or of the part of one, that each step belongs to, in the order of time:
            `(steps, n_envs)`. Negative for steps that must not be drawn.
        fraction: of the episode's length.
        window: start and end as fractions of the episode's length.
        rng: draws the steps.
        scored: whether each step has a log-probability, `(steps, n_envs)`; default: all have one.

    Returns:
        Flat indices into `segments`, ascending.
    """
    kept = np.flatnonzero(segments >= 0)
    flat = segments.ravel()[kept]
    lengths = np.bincount(flat)
    start, end = (np.round(edge * lengths)[flat] for edge in window)
    position = _rank_within(flat, np.arange(len(flat)))
    inside = (start <= position) & (position < end)
    candidates = np.flatnonzero(inside if scored is None else inside & scored.ravel()[kept])
    quota = np.maximum(1, np.round(fraction * lengths))[flat[candidates]]
    draw = rng.random(len(candidates))
    return kept[candidates[_rank_within(flat[candidates], draw) < quota]]


def measured_steps(trained: int, rollout: int) -> int:
    """Return on how many steps to measure what the updates on a rollout did: one for every 40 trained on, at most 16.

    A measured step goes forward twice, without and with what was learned, and a trained one forward in sampling, and
    forward and backward in an update. So the measure costs less than 2 %. After rollouts of fewer than 40 trained steps
    there is none after some of them: with 16 it is measured after the first, the third, the sixth, ...

    Args:
        trained: number of steps trained on in each rollout.
        rollout: number of the rollout, from 1.
    """
    return min(16, math.ceil(trained * rollout / 40) - math.ceil(trained * (rollout - 1) / 40))


def _rank_within(groups: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the rank of each value among those of its group, from 0."""
    order = np.lexsort((values, groups))
    sizes = np.bincount(groups)
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return ranks
