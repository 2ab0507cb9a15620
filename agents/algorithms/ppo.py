"""Proximal policy optimisation, which on the denoising MDP is DDPO-IS (Black et al. 2023, section 4.3).

    ∇J = E[ Σ_t  p_θ(x_{t-1}|x_t,c) / p_old(x_{t-1}|x_t,c) · ∇ log p_θ(x_{t-1}|x_t,c) · A(x_0,c) ]          (DDPO-IS)

with the ratio clipped to [1 − ε, 1 + ε] at every denoising step (Schulman et al. 2017, eq. 7).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.distributed import Metric
from agents.rollout.buffer import Transitions
from ddpo_env.validation.options import POSITIVE, check_value


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
        **arguments: Any,
    ) -> None:
        if not callable(clip_range):
            check_value("clip_range", clip_range, Annotated[float, POSITIVE])
        self.clip_range = clip_range
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
        self.clip_range = FloatSchedule(self.clip_range)

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return the clipped surrogate objective, negative, with critic, entropy and KL terms; and metrics."""
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        policy = self.evaluate(batch)
        ratio = torch.exp(policy.log_ratio)
        unclipped = batch.advantages * ratio
        clipped = batch.advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
        loss, logged = self.regularized(-torch.min(unclipped, clipped).mean(), policy, batch)
        logged["clip_fraction"] = ((ratio.detach() - 1).abs() > clip_range).float().mean()
        logged["clip_range"] = torch.tensor(clip_range)
        return loss, logged
