"""When a run has diverged: it is far worse than it began, and stays so.

The scale is the standard deviation of the pretrained policy's rewards, so the rule needs no threshold in a reward's
unit. In the curves of `docs/*.csv`, no mean of a run that learned falls by one standard deviation. A single bad
iteration is not enough, because policies do recover from one (docs/training.md has an example).
"""

from __future__ import annotations

from collections.abc import Sequence

DEVIATIONS = 3.0
ITERATIONS = 3


class DivergenceError(FloatingPointError):
    """The policy has become useless: weights are not finite, or rewards are far below those before training."""


def is_worse(reward: float, first: float, std: float) -> bool:
    """Return whether the mean reward of an iteration is far below that of the first one.

    Args:
        reward: of the iteration.
        first: of the first iteration, which the pretrained policy sampled.
        std: standard deviation of the pretrained policy's rewards; if it is 0 there is no scale, and nothing is worse.
    """
    return std > 0 and reward < first - DEVIATIONS * std


def has_diverged(rewards: Sequence[float], std: float) -> bool:
    """Return whether the last iterations are all far worse than the first, given every iteration's mean reward."""
    last = rewards[1:][-ITERATIONS:]
    return len(last) == ITERATIONS and all(is_worse(reward, rewards[0], std) for reward in last)
