"""What an algorithm may ask of a policy beyond Stable-Baselines3's interface, and the answers of a stock policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from agents.distributed import Rows
from agents.rollout.buffer import TensorRolloutBuffer, Transitions


class PolicyAbilities:
    """Abilities of a policy, with defaults: a policy derives from this class and overrides what it can do.

    Attributes:
        knows_reference: whether there is a pretrained policy (`evaluate_with_reference`), which a KL penalty needs.
        shares_batches: whether several processes can compute the rows of one batch (`computing`).
        rows: the rows that are computed now, inside `computing`.
    """

    knows_reference: bool = False
    shares_batches: bool = False
    rows: Rows | None = None
    evaluate_actions: Callable[..., tuple[Tensor, Tensor, Tensor | None]]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the policy's network computes."""
        return torch.float32

    def sampling_weights(self) -> AbstractContextManager[None]:
        """Return a context for many calls without gradients, in which the weights do not change."""
        return nullcontext()

    def computing(self, rows: Rows) -> AbstractContextManager[None]:
        """Return a context in which the policy computes some rows of a batch and draws noise for all of them."""
        return nullcontext()

    def evaluate_with_reference(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return what `evaluate_actions` returns, and the KL divergence from the pretrained policy.

        `(batch,)`; `None` where there is no pretrained policy.
        """
        return *self.evaluate_actions(obs, actions), None

    def regression_steps(self, rollout: TensorRolloutBuffer) -> npt.NDArray[np.int64]:
        """Return the flat indices of the steps that reward-weighted regression imitates: all that were not removed."""
        return rollout.kept_steps()

    def regression_loss(self, batch: Transitions) -> Tensor:
        """Return the loss of imitating a batch, `(batch,)`: the negative log-likelihood of its actions."""
        return -self.evaluate_actions(batch.observations, batch.actions)[1]

    def advance_rng(self, rows: int) -> None:
        """Draw the random numbers that `regression_loss` draws for `rows` transitions: none."""


class _StockAbilities(PolicyAbilities):
    """The defaults, for a policy that does not derive from `PolicyAbilities`."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.evaluate_actions = policy.evaluate_actions


def abilities_of(policy: ActorCriticPolicy) -> PolicyAbilities:
    """Return the policy's abilities: the policy itself if it declares them, else the defaults."""
    return policy if isinstance(policy, PolicyAbilities) else _StockAbilities(policy)
