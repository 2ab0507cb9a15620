"""Proximal policy optimisation, which on the denoising MDP is DDPO-IS (Black et al. 2023, section 4.3).

    ∇J = E[ Σ_t  p_θ(x_{t-1}|x_t,c) / p_old(x_{t-1}|x_t,c) · ∇ log p_θ(x_{t-1}|x_t,c) · A(x_0,c) ]          (DDPO-IS)

with the ratio clipped to [1 − ε, 1 + ε] at every denoising step (Schulman et al. 2017, eq. 7).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from torch import Tensor
from torch.nn import functional

from agents.advantages import AdvantageEstimator
from agents.on_policy import TensorOnPolicyAlgorithm
from agents.rollout_buffer import Transitions


class PPO(TensorOnPolicyAlgorithm):
    """PPO with interchangeable advantages, gradient accumulation and training on a subset of the timesteps.

    On other policies and environments it is Stable-Baselines3's PPO, with its defaults.

    Args:
        policy: policy class, or `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`.
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each environment in a rollout.
        batch_size: transitions in one update.
        micro_batch_size: transitions in one call of the policy; the gradients of an update's calls are added up.
            Default: `batch_size`.
        n_epochs: passes over the rollout.
        gamma: discount; 1 for DDPO.
        gae_lambda: λ of `GeneralizedAdvantage`.
        clip_range: ε, or a function of the remaining progress. With log-densities averaged over the latent, as DDPO has
            them, it is tiny: 1e-4 at 16,384 dimensions.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the critic's loss.
        max_grad_norm: gradients are clipped to this norm.
        target_kl: the iteration's updates end when the estimated KL from the old policy exceeds 1.5 times this.
        timestep_fraction: share of each episode's steps, chosen at random, that is trained on; in (0, 1].
        timestep_window: part of each episode from which these steps are chosen, as shares of its length. The last step
            of a denoising trajectory has almost no noise: its gradient is by far the largest, and its effect on the
            picture the smallest, so `(0.0, 0.9)` can learn much faster.
        advantage: estimator; default: `GeneralizedAdvantage`.
        **arguments: of `TensorOnPolicyAlgorithm`: `context_key`, `policy_kwargs`, `verbose`, `seed`, `device`, ...

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
        micro_batch_size: int | None = None,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        timestep_fraction: float = 1.0,
        timestep_window: tuple[float, float] = (0.0, 1.0),
        advantage: AdvantageEstimator | None = None,
        **arguments: Any,
    ) -> None:
        """See the class docstring for the arguments."""
        sizes = {"n_steps": n_steps, "batch_size": batch_size, "n_epochs": n_epochs}
        if micro_batch_size is not None:
            sizes["micro_batch_size"] = micro_batch_size
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if not callable(clip_range) and not clip_range > 0:
            raise ValueError(f"clip_range must be above 0; got {clip_range}")
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction must be in (0, 1]; got {timestep_fraction}")
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size or batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.target_kl = target_kl
        start, end = timestep_window
        if not 0 <= start < end <= 1:
            raise ValueError(f"timestep_window must be two shares, 0 <= start < end <= 1; got {timestep_window}")
        self.timestep_fraction = timestep_fraction
        self.timestep_window = (start, end)
        self._n_updates = 0
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            advantage=advantage,
            **arguments,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        self.clip_range = FloatSchedule(self.clip_range)

    def train(self) -> None:
        """Update the policy on the rollout: `n_epochs` passes in batches of `batch_size` transitions."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        metrics: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.n_epochs):
            indices = np.random.permutation(self._chosen_steps())
            for start in range(0, len(indices), self.batch_size):
                if not self._update(indices[start : start + self.batch_size], clip_range, metrics):
                    break
            else:
                continue
            break
        self._record_training(metrics, clip_range)

    def loss(self, batch: Transitions, clip_range: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of some transitions, and what is to be logged, each averaged over them."""
        actions = batch.actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else batch.actions
        values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, actions)
        log_ratio = log_prob - batch.log_probs
        ratio = torch.exp(log_ratio)
        unclipped = batch.advantages * ratio
        clipped = batch.advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
        policy_loss = -torch.min(unclipped, clipped).mean()
        value_loss = functional.mse_loss(batch.returns, values.flatten())
        entropy_loss = -(entropy if entropy is not None else -log_prob).mean()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
        with torch.no_grad():
            logged = {
                "loss": loss.detach(),
                "policy_gradient_loss": policy_loss.detach(),
                "value_loss": value_loss.detach(),
                "entropy_loss": entropy_loss.detach(),
                # Schulman's estimator (http://joschu.net/blog/kl-approx.html); expm1 keeps its digits near ratio 1
                "approx_kl": (torch.expm1(log_ratio) - log_ratio).mean(),
                "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean(),
                "ratio_deviation": (ratio - 1).abs().max(),
            }
        return loss, logged

    def _update(self, indices: npt.NDArray[np.int64], clip_range: float, metrics: dict[str, list[float]]) -> bool:
        """One optimizer step on the transitions at `indices`; False if the KL target stopped it."""
        self.policy.optimizer.zero_grad()
        logged: dict[str, list[float]] = defaultdict(list)
        for start in range(0, len(indices), self.micro_batch_size):
            part = indices[start : start + self.micro_batch_size]
            weight = len(part) / len(indices)
            loss, values = self.loss(self.rollout_buffer[part], clip_range)
            (loss * weight).backward()
            deviation = float(values.pop("ratio_deviation"))
            for name, value in values.items():
                logged[name].append(float(value) * weight)
            logged["ratio_deviation"].append(deviation)
        deviation = max(logged.pop("ratio_deviation"))
        if not metrics["ratio_deviation"]:  # only the first update of an iteration is on-policy
            metrics["ratio_deviation"].append(deviation)
        for name, parts in logged.items():
            metrics[name].append(sum(parts))
        if self.target_kl is not None and metrics["approx_kl"][-1] > 1.5 * self.target_kl:
            return False
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is not finite after {self._n_updates} updates (loss {metrics['loss'][-1]}): "
                "lower learning_rate or clip_range, or train in float32"
            )
        metrics["grad_norm"].append(float(norm))
        self.policy.optimizer.step()
        self._n_updates += 1
        return True

    def _chosen_steps(self) -> npt.NDArray[np.int64]:
        """Flat indices of the steps to train on: `timestep_fraction` of each episode's, from its `timestep_window`."""
        segments = self.rollout_buffer.segments.ravel()
        lengths = np.bincount(segments)
        start, end = (np.round(edge * lengths)[segments] for edge in self.timestep_window)
        position = _rank_within(segments, np.arange(len(segments)))
        candidates = np.flatnonzero((start <= position) & (position < end))
        quota = np.maximum(1, np.round(self.timestep_fraction * lengths))[segments[candidates]]
        draw = np.random.random(len(candidates))
        return candidates[_rank_within(segments[candidates], draw) < quota]

    def _record_training(self, metrics: dict[str, list[float]], clip_range: float) -> None:
        for name, values in metrics.items():
            if values:
                self.logger.record(f"train/{name}", float(np.mean(values)))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)
        if self.rollout_buffer.returns.any():
            predicted = self.rollout_buffer.values.flatten().cpu().numpy()
            returns = self.rollout_buffer.returns.flatten().cpu().numpy()
            self.logger.record("train/explained_variance", float(explained_variance(predicted, returns)))


def _rank_within(groups: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Rank of each value among those of its group, from 0."""
    order = np.lexsort((values, groups))
    sizes = np.bincount(groups)
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return ranks
