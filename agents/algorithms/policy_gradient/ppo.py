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
from agents.algorithms.on_policy import Metrics
from agents.algorithms.options import TrustRegion
from agents.algorithms.policy_gradient.trust_region import surrogate
from agents.algorithms.whole_episodes import WholeEpisodesAlgorithm
from agents.distributed import Metric
from agents.policy.abilities import PolicyEvaluation, SamplerAbilities
from agents.policy.weight_copies import WeightSnapshot
from agents.rollout.buffer import Transitions
from ddpo_env.tensors import copied_to
from ddpo_env.validation.options import POSITIVE, check_value

_UNCHANGED = torch.zeros(()), torch.ones(())
"""Mean and standard deviation with which standardised advantages are what they were."""


class PPO(WholeEpisodesAlgorithm):
    """PPO with interchangeable advantages, gradient accumulation and training on a subset of the timesteps.

    With other policies and environments it behaves like Stable-Baselines3's PPO, with its defaults.

    Args:
        policy: policy class, or `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`.
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout; default: one episode of a denoising environment, 2,048 of
            another.
        batch_size: transitions in one update.
        n_epochs: passes over the rollout.
        clip_range: ε, or a function of the remaining progress. DDPO averages log-probabilities over the latent's
            dimensions, so 0.2 never clips there: runs use 1e-4 at 16,384 dimensions and 3e-3 for the bundled model.
        clip_range_vf: new values of the critic stay this close to the old ones in its loss, or a function of the
            remaining progress; default: no clipping. It depends on the reward's scale.
        normalize_advantage: whether each update standardises its own advantages. Default: only where
            `advantage` is left open and the policy has a critic, so that the estimator is generalized advantages as in
            Stable-Baselines3; other estimators standardise as they say.
        trust_region: how an update is kept near the policy that sampled: `"clip"`, or, for a policy whose actions are
            the steps of a sampler, `"guard"` or `"dppo"`, see `trust_region.py`. The means of the policy that sampled
            are computed again, so from the second update of an iteration on these two cost a call without gradient.
        divergence_limit: δ of `dppo`; 1e-5 in its authors' code.
        **arguments: of `TensorOnPolicyAlgorithm`: `micro_batch_size`, `target_kl`, `kl_coef`, `timestep_fraction`, ...;
            and of `RolloutAlgorithm`: `gamma`, `gae_lambda`, `advantage`, `policy_kwargs`, `seed`, `device`, ...

    Raises:
        ValueError: for an argument that is not valid.
    """

    generic_steps = 2048

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int | None = None,
        batch_size: int = 64,
        n_epochs: int = 10,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool | None = None,
        trust_region: TrustRegion = "clip",
        divergence_limit: float = 1e-5,
        **arguments: Any,
    ) -> None:
        check_value("trust_region", trust_region, TrustRegion)
        check_value("divergence_limit", divergence_limit, Annotated[float, POSITIVE])
        self.trust_region: TrustRegion = trust_region
        self.divergence_limit = divergence_limit
        for name, value in {"clip_range": clip_range, "clip_range_vf": clip_range_vf}.items():
            if not callable(value) and (value is not None or name == "clip_range"):
                check_value(name, value, Annotated[float, POSITIVE])
        check_value("normalize_advantage", normalize_advantage, bool | None)
        self.clip_range, self.clip_range_vf = clip_range, clip_range_vf
        self.normalize_advantage = bool(normalize_advantage)
        self._given_normalization = normalize_advantage
        self._batch_moments = _UNCHANGED
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
        if self._given_advantage is None and isinstance(self.advantage, GeneralizedAdvantage):
            self.advantage = GeneralizedAdvantage(normalize=False)
            self.normalize_advantage = self._given_normalization is not False
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
        self._sampled = WeightSnapshot()
        if self.trust_region != "clip":
            self._check_steps()
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    @property
    def target_kl(self) -> float | None:
        """`UpdateOptions.target_kl`, under its name in Stable-Baselines3."""
        return self.options.target_kl

    def train(self) -> None:
        """Update the policy on the rollout; a trust region of means compares it with what it is now."""
        if self.trust_region != "clip":
            self._sampled = WeightSnapshot(self._learning_parameters(), self._n_updates)
        super().train()

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return the clipped surrogate objective, negative, with critic, entropy and KL terms; and metrics."""
        policy = self.evaluate(batch) if self.trust_region == "clip" else self.evaluate_move(batch)
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
        """Return the surrogate objective of the trust region, negative, a scalar; and metrics."""
        clip_range = self.scheduled("clip_range", self.clip_range)
        objective, logged = surrogate(self.trust_region, policy, advantages, clip_range, self.divergence_limit)
        return -objective.mean(), logged

    def evaluate_move(self, batch: Transitions) -> PolicyEvaluation:
        """Evaluate transitions, and how far the means of their steps have moved since they were sampled.

        In the first update of an iteration the current policy is the one that sampled, and nothing has moved.
        """
        policy, observations = self.abilities, batch.observations
        assert isinstance(policy, SamplerAbilities)
        sampling_mean = None
        if not self._sampled.is_current(self._n_updates):
            with torch.no_grad(), self._sampled.in_use():
                sampling_mean = policy.get_distribution(observations).mean
        now = policy.get_distribution(observations)
        move = policy.move_of(now, now.mean.detach() if sampling_mean is None else sampling_mean)
        values, log_prob = self.policy.predict_values(observations).flatten(), now.log_prob(batch.actions)
        reference_kl = policy.reference_kl(observations, now) if self.options.kl_coef else None
        return PolicyEvaluation(values, log_prob, log_prob - batch.log_probs, now.entropy(), reference_kl, move)

    def _check_steps(self) -> None:
        policy = self.abilities
        if not isinstance(policy, SamplerAbilities):
            raise ValueError(
                f"trust_region must be clip for a {type(self.policy).__name__}, whose actions are not the steps of a "
                f"sampler (SamplerAbilities); got {self.trust_region!r}"
            )
        if self.trust_region == "guard" and (policy.sampler.flow_step[policy.sampler.is_stochastic] <= 0).any():
            raise ValueError(
                f"trust_region must not be guard with this sampler, which has a step with noise that does not move in "
                f"flow time, and guard divides by it; its steps are {policy.sampler.flow_step.tolist()}"
            )

    def _update(self, indices: npt.NDArray[np.int64], metrics: Metrics) -> bool:
        if self.normalize_advantage:
            rollout = self.rollout_buffer
            chosen = rollout.advantages.flatten()[copied_to(indices, rollout.device)]
            # One transition has no spread, so it is left as it is, as in Stable-Baselines3.
            self._batch_moments = (chosen.mean(), chosen.std()) if len(indices) > 1 else _UNCHANGED
        return super()._update(indices, metrics)
