"""When a run has diverged: it is far worse than it began, and stays so.

The scale is the standard deviation of the pretrained policy's rewards, so the rule needs no threshold in a reward's
unit. In the curves of `docs/*.csv`, no mean of a run that learned falls by one standard deviation. A single bad
iteration is not enough, because policies do recover from one (docs/training.md has an example).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Sized

import numpy as np
import numpy.typing as npt

DEVIATIONS = 3.0
ITERATIONS = 3
LEAST_SAMPLES, LEAST_PROMPTS = 16, 4
"""With fewer samples or prompts the standard deviation is no scale: rewards differ between prompts, and each iteration
has other prompts."""
NEGLIGIBLE_KL = 1e-9
"""Nats per dimension of a step's KL divergence from the pretrained policy: a mean that has moved by less than 5e-5
standard deviations, where no reward can have fallen because of training. Runs that learn have 1e-6 and more."""
LARGEST_KL = 1.0
"""Nats per dimension by which the updates of one iteration may move a step before a warning: 1.4 standard deviations of
the mean in every dimension. Runs that learn have 1e-3 and less."""


class DivergenceError(FloatingPointError):
    """The policy has become useless: weights are not finite, or rewards are far below those before training."""


def spread(rewards: npt.NDArray[np.float64], prompts: Sequence[Hashable], source: object) -> float:
    """Return the standard deviation of the pretrained policy's rewards; 0 if too few samples or prompts have them.

    Args:
        rewards: one per sample.
        prompts: one per sample.
        source: all prompts that there are, if their number is known: it may be smaller than `LEAST_PROMPTS`.
    """
    least = min(LEAST_PROMPTS, len(source)) if isinstance(source, Sized) else LEAST_PROMPTS
    return float(rewards.std()) if len(rewards) >= LEAST_SAMPLES and len(set(prompts)) >= least else 0.0


def watch_reward(rewards: Sequence[float], std: float, kl: float | None, stops: bool) -> str | None:
    """Return a warning if the last iteration is far worse than the first one; `None` if it is not.

    Args:
        rewards: mean of every iteration.
        std: as for `is_worse`.
        kl: divergence from the pretrained policy in nats per dimension; `None` if it is not known.
        stops: whether a run that has diverged is an error.

    Raises:
        DivergenceError: the run has diverged.
    """
    if kl is not None and kl < NEGLIGIBLE_KL:
        return None
    if stops and has_diverged(rewards, std):
        raise DivergenceError(
            f"the mean reward fell from {rewards[0]:.4g} in the first iteration to {rewards[-1]:.4g}; in the last "
            f"{ITERATIONS} iterations it was more than {DEVIATIONS:g} standard deviations of the pretrained policy's "
            f"rewards ({std:.4g}) lower: lower learning_rate, or set stop_on_divergence=False"
        )
    if not is_worse(rewards[-1], rewards[0], std):
        return None
    return (
        f"the mean reward of iteration {len(rewards)}, {rewards[-1]:.4g}, is more than {DEVIATIONS:g} standard "
        f"deviations below the first iteration's {rewards[0]:.4g}"
    )


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
