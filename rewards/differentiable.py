"""Rewards whose scores have a gradient with respect to the sample, for training by backpropagation (`agents.DRaFT`).

A reward declares the ability by a method, `differentiable_score`, which computes on tensors what the reward computes on
arrays. JPEG sizes and a judge's text have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rewards.protocol import calling_user_code, reward_name
from rewards.registry import BUILTIN_REWARDS, reward_names

if TYPE_CHECKING:  # settings are checked without torch
    from torch import Tensor

DIFFERENTIABLE_REWARDS = ("aesthetic", "clip_score", "pickscore", "hps_v2")
"""Names of the built-in ones."""


@runtime_checkable
class DifferentiableReward(Protocol):
    """A reward that can be differentiated.

    The score of a sample must not depend on the other samples, and the method must not change the reward's state.
    """

    def differentiable_score(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return what calling the reward returns, (batch,), with a gradient.

        Args:
            samples: Images, (batch, 3, height, width) in [0, 1], before they are rounded to 256 levels; or what the
                model's `decode_with_gradient` returns, if it generates something else.
            prompts: One per sample.
        """
        ...


def score_with_gradient(reward: DifferentiableReward, samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the scores of a reward, (batch,), on the device of the samples.

    Raises:
        Exception: Whatever the reward raises, with a note that names it.
        ValueError: The scores have another shape or no gradient, or are not finite although the samples are.
    """
    name = reward_name(reward)
    with calling_user_code(f"raised by the reward {name}, differentiating {len(samples)} samples"):
        scores = reward.differentiable_score(samples, prompts)
    if scores.shape != (len(samples),) or not scores.requires_grad:
        has = "a" if scores.requires_grad else "no"
        raise ValueError(
            f"reward {name}: differentiable_score must return shape ({len(samples)},) with a gradient; got "
            f"{tuple(scores.shape)} with {has} gradient"
        )
    if not scores.isfinite().all() and samples.isfinite().all():
        first = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(
            f"reward {name}: differentiable_score must be finite; got {scores[first].item()} for prompt "
            f"{prompts[first]!r} (sample {first} of {len(samples)})"
        )
    return scores.to(samples.device)


def require_finite_gradient(reward: DifferentiableReward, samples: Tensor) -> None:
    """Let a backward pass to samples, through the reward's scores alone, end with a `ValueError` if it is not finite.

    Args:
        reward: The reward that scores the samples; the error names it.
        samples: With a gradient.
    """

    def check(gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            raise ValueError(
                f"reward {reward_name(reward)}: the gradient of differentiable_score must be finite; got "
                f"{int((~gradient.isfinite()).sum())} of {gradient.numel()} numbers that are not, as from the square "
                "root or the logarithm of 0"
            )

    samples.register_hook(check)


def check_differentiable_names(spec: str) -> None:
    """Refuse built-in rewards without a gradient, by their names alone: nothing is loaded.

    Args:
        spec: The name of a reward, or a weighted sum.

    Raises:
        ValueError: It names such a reward, or is not spelled as one.
    """
    names = [name for name in reward_names(spec) if name in BUILTIN_REWARDS]
    refuse_without_gradient([name for name in names if name not in DIFFERENTIABLE_REWARDS])


def refuse_without_gradient(names: Sequence[str]) -> None:
    """Raise a `ValueError` with the names of rewards that have no gradient, if there are any."""
    if names:
        raise ValueError(
            f"reward must be differentiable, and {', '.join(names)} is not: take {', '.join(DIFFERENTIABLE_REWARDS)}, "
            "a weighted sum of these, or one of your own with differentiable_score(samples, prompts), see "
            "rewards.DifferentiableReward"
        )
