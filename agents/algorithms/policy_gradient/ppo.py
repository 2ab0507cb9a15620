"""Proximal policy optimisation, which on the denoising MDP is DDPO-IS (Black et al. 2023, section 4.3).

    ∇J = E[ Σ_t  p_θ(x_{t-1}|x_t,c) / p_old(x_{t-1}|x_t,c) · ∇ log p_θ(x_{t-1}|x_t,c) · A(x_0,c) ]          (DDPO-IS)

with the ratio clipped to [1 − ε, 1 + ε] at every denoising step (Schulman et al. 2017, eq. 7).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from agents.algorithms.advantages import GeneralizedAdvantage
from agents.algorithms.on_policy import Metrics, TensorOnPolicyAlgorithm
from agents.distributed import Metric
from agents.policy.abilities import PolicyEvaluation
from agents.rollout.buffer import Transitions
from ddpo_env.validation.options import POSITIVE, check_value
from rewards.devices import copied_to


class PPO(TensorOnPolicyAlgorithm):
    """PPO with interchangeable advantages, gradient accumulation and training on a subset of the timesteps.

    With other policies and environments it behaves like Stable-Baselines3's PPO, with its defaults.

    Args:
        policy: policy class, or `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`.
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout.
        batch_size: transitions in one update.
        n_epochs: passes over the rollout.
        clip_range: ε, or a function of the remaining progress. DDPO averages log-probabilities over the latent's
            dimensions, so it is tiny there: 1e-4 at 16,384 dimensions.
        clip_range_vf: new values of the critic stay this close to the old ones in its loss, or a function of the
            remaining progress; default: no clipping. It depends on the reward's scale.
        normalize_advantage: whether each update standardises its own advantages. Default: only without `advantage`,
            which is then generalized advantages as in Stable-Baselines3; other estimators standardise as they say.
        **arguments: of `TensorOnPolicyAlgorithm`: `micro_batch_size`, `target_kl`, `kl_coef`, `timestep_fraction`, ...;
            and of `RolloutAlgorithm`: `gamma`, `gae_lambda`, `advantage`, `policy_kwargs`, `seed`, `device`, ...

    Raises:
        ValueError: for an argument that is not valid.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool | None = None,
        **arguments: Any,
    ) -> None:
        for name, value in {"clip_range": clip_range, "clip_range_vf": clip_range_vf}.items():
            if not callable(value) and (value is not None or name == "clip_range"):
                check_value(name, value, Annotated[float, POSITIVE])
        check_value("normalize_advantage", normalize_advantage, bool | None)
        self.clip_range, self.clip_range_vf = clip_range, clip_range_vf
        is_stock = arguments.get("advantage") is None
        if is_stock:
            arguments["advantage"] = GeneralizedAdvantage(normalize=False)
        self.normalize_advantage = is_stock if normalize_advantage is None else normalize_advantage
        self._batch_moments = torch.zeros(()), torch.ones(())
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            **arguments,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        steps = self.n_steps * self.n_envs * self.processes.count
        whole = self.options.timestep_window == (0.0, 1.0) and self.options.timestep_fraction == 1
        stochastic = self.abilities.stochastic_steps()
        whole &= self.options.noise_window is None and (stochastic is None or bool(stochastic.all()))
        if whole and self.batch_size is not None and steps % self.batch_size:
            warnings.warn(
                f"batch_size={self.batch_size} does not divide the {steps} steps of a rollout: the last update of each "
                "epoch trains on fewer transitions",
                stacklevel=2,
            )
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    @property
    def target_kl(self) -> float | None:
        """`UpdateOptions.target_kl`, under its name in Stable-Baselines3."""
        return self.options.target_kl

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return the clipped surrogate objective, negative, with critic, entropy and KL terms; and metrics."""
        policy = self.evaluate(batch)
        if self.clip_range_vf is not None:
            limit = self.scheduled("clip_range_vf", self.clip_range_vf)
            policy = replace(policy, values=batch.values + (policy.values - batch.values).clamp(-limit, limit))
        advantages = batch.advantages
        if self.normalize_advantage:
            mean, std = self._batch_moments
            advantages = (advantages - mean) / (std + 1e-8)
        policy_loss, own = self.surrogate(policy, advantages, batch)
        loss, logged = self.regularized(policy_loss, policy, batch)
        return loss, logged | own

    def surrogate(
        self, policy: PolicyEvaluation, advantages: Tensor, batch: Transitions
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return the clipped surrogate objective, negative, a scalar; and metrics."""
        clip_range = self.scheduled("clip_range", self.clip_range)
        objective, logged = clipped_surrogate(torch.exp(policy.log_ratio), advantages, clip_range)
        return -objective.mean(), logged

    def _update(self, indices: npt.NDArray[np.int64], metrics: Metrics) -> bool:
        if self.normalize_advantage and len(indices) > 1:  # one transition has no spread, as in Stable-Baselines3
            rollout = self.rollout_buffer
            chosen = rollout.advantages.flatten()[copied_to(indices, rollout.device)]
            self._batch_moments = chosen.mean(), chosen.std()
        return super()._update(indices, metrics)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, dict[str, Metric]]:
    """Return PPO's objective of ratios, `(batch,)`, and the metrics that all algorithms with such a ratio log."""
    clipped = advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    logged: dict[str, Metric] = {
        "clip_fraction": ((ratio.detach() - 1).abs() > clip_range).float().mean(),
        "clip_range": torch.tensor(clip_range),
    }
    return torch.min(advantages * ratio, clipped), logged
