"""Reward-weighted regression, the paper's baseline (Black et al. 2023, section 4.2; Peters & Schaal 2007).

    L = E[ w(x_0,c) · ‖ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t, c) − ε‖² ],    w ∝ exp(β r)             (RWR)
                                                                 or  w = 1[r ≥ percentile]     (RWR-sparse)

The policy imitates its own good samples. What imitation means is the policy's: a `DiffusionPolicy` regresses with its
pretraining's denoising loss on final samples, which ignores that sampling is sequential; any other policy maximises the
likelihood of its actions.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor
from torch.nn import functional

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.distributed import Processes
from agents.rollout.buffer import TensorRolloutBuffer, Transitions

Weighting = Literal["exponential", "percentile"]


class LikelihoodRegression:
    """Imitation by likelihood, for policies that have no way of their own; `RWR` mixes it into them."""

    def regression_steps(self, rollout: TensorRolloutBuffer) -> npt.NDArray[np.int64]:
        """Return the flat indices of the steps whose actions are imitated: all that were not dropped."""
        return rollout.kept_steps()

    def regression_loss(self, batch: Transitions) -> Tensor:
        """Return the negative log-likelihood of the actions, `(batch,)`."""
        discrete = isinstance(self.action_space, spaces.Discrete)  # type: ignore[attr-defined]
        actions = batch.actions.long().flatten() if discrete else batch.actions
        return -self.evaluate_actions(batch.observations, actions)[1]  # type: ignore[attr-defined]

    def pass_over_regression(self, rows: int) -> None:
        """Draw the random numbers that `regression_loss` draws for `rows` transitions: none."""


class RWR(TensorOnPolicyAlgorithm):
    """Reward-weighted regression on rollouts of the present policy.

    The weights are made from the estimator's advantages and have mean 1 over the rollout's imitated steps.

    Args:
        policy: policy class, or `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`.
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each environment in a rollout.
        n_epochs: passes over the rollout; the paper has 5, and 50 with the percentile.
        weighting: `"exponential"` (RWR) or `"percentile"` (RWR-sparse).
        beta: of the exponential weights, in 1 / (the advantage's unit).
        percentile: of the advantages, from which on a step counts, in [0, 100).
        **arguments: of `TensorOnPolicyAlgorithm`: `batch_size` and `micro_batch_size` (in imitated steps, for a
            diffusion policy pictures), `kl_coef`, ...; of `RolloutAlgorithm`: `gamma`, `advantage`, ...
            `timestep_fraction` and `timestep_window` say nothing to a policy that chooses its own steps.

    Raises:
        ValueError: for an argument that is not valid.
    """

    compares_with_sampling = False

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 256,
        n_epochs: int = 5,
        weighting: Weighting = "exponential",
        beta: float = 1.0,
        percentile: float = 90.0,
        **arguments: Any,
    ) -> None:
        """See the class docstring for the arguments."""
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}; got {weighting!r}")
        if not 0 < beta < np.inf:
            raise ValueError(f"beta must be above 0; got {beta}")
        if not 0 <= percentile < 100:
            raise ValueError(f"percentile must be in [0, 100); got {percentile}")
        self.weighting: Weighting = weighting
        self.beta = beta
        self.percentile = percentile
        super().__init__(
            policy, env, learning_rate=learning_rate, n_steps=n_steps, n_epochs=n_epochs, ent_coef=0.0, **arguments
        )

    def _setup_model(self) -> None:
        if not hasattr(self.policy_class, "regression_loss"):
            name, bases = self.policy_class.__name__, (LikelihoodRegression, self.policy_class)
            self.policy_class = type(name, bases, {})
        super()._setup_model()

    @property
    def _imitation(self) -> LikelihoodRegression:
        """The policy, as something that imitates: by likelihood, or by what it defines in its place."""
        return self.policy  # type: ignore[return-value]

    def credit(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the weight of every step that is imitated, 0 for the others."""
        advantages = super().credit(rollout).flatten().double()
        steps = torch.as_tensor(self._imitation.regression_steps(rollout), device=advantages.device)
        chosen = advantages[steps]
        if self.weighting == "exponential":
            weights = torch.exp(self.beta * (chosen - chosen.max()))
        else:
            weights = (chosen >= torch.quantile(chosen, self.percentile / 100)).double()
        credit = torch.zeros_like(advantages)
        credit[steps] = weights / weights.mean()
        return credit.float().view(rollout.rewards.shape)

    def select_steps(self) -> npt.NDArray[np.int64]:
        """Return the imitated steps that have a weight."""
        steps = self._imitation.regression_steps(self.rollout_buffer)
        return steps[self.rollout_buffer.advantages.flatten().cpu().numpy()[steps] > 0]

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted imitation loss, with critic and KL terms; and metrics."""
        regression_loss = (batch.advantages * self._imitation.regression_loss(batch)).mean()
        loss = regression_loss
        logged = {"regression_loss": regression_loss.detach(), "largest_weight": batch.advantages.max()}
        values = self.policy.predict_values(batch.observations).flatten()
        if values.requires_grad:
            value_loss = functional.mse_loss(values, batch.returns)
            loss = loss + self.vf_coef * value_loss
            logged["value_loss"] = value_loss.detach()
        if self.kl_coef:  # on steps of whole trajectories: the imitated ones may be the last alone
            share = getattr(self.policy, "share", None) or Processes().share(len(values))
            penalty = self.evaluate(self.rollout_buffer[share.of(self.random_steps(share.total))]).reference_kl
            assert penalty is not None
            loss = loss + self.kl_coef * penalty.mean()
            logged["kl_penalty"] = self.kl_coef * penalty.mean().detach()
        return loss, logged | {"loss": loss.detach()}

    def pass_over(self, rows: int) -> None:
        """Draw what `loss` draws: the noise that samples are imitated under, and the steps of the KL penalty."""
        self._imitation.pass_over_regression(rows)
        if self.kl_coef:
            self.random_steps(rows)
