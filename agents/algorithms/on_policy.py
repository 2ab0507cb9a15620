"""The update that this package's algorithms share; an algorithm is what it adds, its `loss`.

Chosen timesteps, batches, micro-batches whose gradients are accumulated, half precision, gradient clipping, the KL
divergences from the sampling and from the pretrained policy, averaged weights, metrics.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from diffusers.training_utils import EMAModel
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import explained_variance
from torch import Tensor
from torch.nn import functional

from agents.algorithms.rollout_algorithm import RolloutAlgorithm
from agents.algorithms.timesteps import check_timesteps, choose_steps
from agents.distributed import sharing
from agents.rollout.buffer import Transitions
from rewards.devices import copied_to

Metrics = defaultdict[str, list[float]]

_DRIFT_ROWS = 16
"""Transitions on which an iteration's drift is measured, so that it costs next to nothing."""


@dataclass(frozen=True)
class Evaluation:
    """What the present policy says of some transitions.

    Attributes:
        values: the critic's, `(batch,)`.
        log_prob: of their actions, `(batch,)`.
        log_ratio: `log_prob` less that of the policy that sampled them, `(batch,)`.
        entropy: `(batch,)`.
        reference_kl: KL divergence from the pretrained policy, `(batch,)`; `None` where it was not asked for.
    """

    values: Tensor
    log_prob: Tensor
    log_ratio: Tensor
    entropy: Tensor
    reference_kl: Tensor | None


class TensorOnPolicyAlgorithm(RolloutAlgorithm):
    """Base of the algorithms here: implement `loss`.

    Args:
        policy: policy class, or `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`.
        env: environment, vectorized environment or id.
        batch_size: transitions in one update; default: all that are trained on.
        micro_batch_size: transitions in one call of the policy; the gradients of an update's calls are added up.
            Default: `batch_size`.
        n_epochs: passes over the rollout.
        target_kl: the iteration's updates end when the estimated KL from the sampling policy exceeds 1.5 times this.
        kl_coef: weight of the KL divergence from the pretrained policy in the loss; the policy must know it
            (`DiffusionPolicy` does). Reduced over the latent as the log-density is.
        timestep_fraction: share of each episode's steps, chosen at random, that is trained on; in (0, 1].
        timestep_window: part of each episode from which these steps are chosen, as shares of its length. The last step
            of a denoising trajectory has almost no noise: its gradient is by far the largest, and its effect on the
            picture the smallest, so `(0.0, 0.9)` can learn much faster.
        recompute_log_probs: whether the sampling policy's log-densities are computed again before the first update, in
            the very micro-batches that are trained on. In half precision they depend on the batch's shape, and the
            ratio would start off 1. Default: in half precision only, and where the loss has a ratio.
        ema_decay: decay of an exponential moving average of what learns, see `averaged_weights`; 0 for none.
        **arguments: of `RolloutAlgorithm`: `learning_rate`, `n_steps`, `gamma`, `advantage`, `policy_kwargs`, ...

    Raises:
        ValueError: for an argument that is not valid.
    """

    compares_with_sampling: ClassVar[bool] = True
    """Whether the loss compares the policy with the one that sampled, by the log-densities that the rollout holds."""

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        batch_size: int | None = None,
        n_epochs: int = 1,
        micro_batch_size: int | None = None,
        target_kl: float | None = None,
        kl_coef: float = 0.0,
        timestep_fraction: float = 1.0,
        timestep_window: tuple[float, float] = (0.0, 1.0),
        recompute_log_probs: bool | None = None,
        ema_decay: float = 0.0,
        learning_rate: float | Schedule,
        n_steps: int,
        **arguments: Any,
    ) -> None:
        """See the class docstring for the arguments."""
        sizes = {"n_steps": n_steps, "n_epochs": n_epochs, "batch_size": batch_size}
        for name, value in (sizes | {"micro_batch_size": micro_batch_size}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if not 0 <= kl_coef < np.inf:
            raise ValueError(f"kl_coef must be at least 0; got {kl_coef}")
        if target_kl is not None and not target_kl > 0:
            raise ValueError(f"target_kl must be above 0, or None; got {target_kl}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1); got {ema_decay}")
        check_timesteps(timestep_fraction, timestep_window)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.n_epochs = n_epochs
        self.target_kl = target_kl
        self.kl_coef = kl_coef
        self.timestep_fraction = timestep_fraction
        self.timestep_window = timestep_window
        self.recompute_log_probs = recompute_log_probs
        self.ema_decay = ema_decay
        self.ema: EMAModel | None = None
        self._n_updates = 0
        super().__init__(policy, env, learning_rate=learning_rate, n_steps=n_steps, **arguments)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.kl_coef and not hasattr(self.policy, "evaluate_with_reference"):
            raise ValueError(
                f"kl_coef must be 0 for a {type(self.policy).__name__}, which knows no pretrained policy "
                f"(no evaluate_with_reference); got {self.kl_coef}"
            )
        compute_dtype = getattr(self.policy, "compute_dtype", torch.float32)
        if self.recompute_log_probs is None:
            self.recompute_log_probs = self.compares_with_sampling and compute_dtype != torch.float32
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=compute_dtype == torch.float16)
        if self.ema_decay and self.ema is None:
            self.ema = EMAModel(self._learning_parameters(), decay=self.ema_decay)

    @abstractmethod
    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of some transitions, and what is to be logged, each averaged over them."""

    def pass_over(self, rows: int) -> None:
        """Draw the random numbers that `loss` would for `rows` transitions, which another process computes."""

    def select_steps(self) -> npt.NDArray[np.int64]:
        """Return the flat indices of the rollout's steps that an epoch trains on."""
        return choose_steps(self.rollout_buffer.segments, self.timestep_fraction, self.timestep_window)

    def random_steps(self, count: int) -> npt.NDArray[np.int64]:
        """Return flat indices of up to `count` of the steps that `timestep_window` lets through, drawn at random."""
        return np.random.permutation(choose_steps(self.rollout_buffer.segments, 1.0, self.timestep_window))[:count]

    def train(self) -> None:
        """Update the policy on the rollout: `n_epochs` passes in batches of `batch_size` transitions."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        metrics: Metrics = defaultdict(list)
        for epoch in range(self.n_epochs):
            indices = np.random.permutation(self.select_steps())
            if epoch == 0 and self.recompute_log_probs:
                self._recompute_log_probs(indices)
            if not self._pass(indices, metrics):
                break
        for name, value in self.drift(self.random_steps(_DRIFT_ROWS)).items():
            metrics[name].append(value)
        self._record_training(metrics)

    def evaluate(self, batch: Transitions, with_reference: bool | None = None) -> Evaluation:
        """Evaluate transitions under the present policy.

        Args:
            batch: out of the rollout buffer.
            with_reference: whether to run the pretrained policy too; default: if there is a penalty.
        """
        discrete = isinstance(self.action_space, spaces.Discrete)
        actions = batch.actions.long().flatten() if discrete else batch.actions
        reference_kl = None
        if self.kl_coef > 0 if with_reference is None else with_reference:
            values, log_prob, entropy, reference_kl = self.policy.evaluate_with_reference(batch.observations, actions)  # type: ignore[operator]
        else:
            values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, actions)
        entropy = -log_prob if entropy is None else entropy  # a distribution without a closed form
        return Evaluation(values.flatten(), log_prob, log_prob - batch.log_probs, entropy, reference_kl)

    def regularized(
        self, policy_loss: Tensor, policy: Evaluation, batch: Transitions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a policy's loss with what every algorithm adds (critic, entropy bonus, KL penalty), and metrics."""
        loss = policy_loss
        logged = {"policy_gradient_loss": policy_loss.detach()}
        if policy.values.requires_grad:
            value_loss = functional.mse_loss(policy.values, batch.returns)
            loss = loss + self.vf_coef * value_loss
            logged["value_loss"] = value_loss.detach()
        entropy_loss = -policy.entropy.mean()
        loss = loss + self.ent_coef * entropy_loss
        logged["entropy_loss"] = entropy_loss.detach()
        if policy.reference_kl is not None:
            penalty = policy.reference_kl.mean()
            loss = loss + self.kl_coef * penalty
            logged["kl_penalty"] = self.kl_coef * penalty.detach()
        log_ratio = policy.log_ratio.detach()
        logged["loss"] = loss.detach()
        logged["approx_kl"] = approximate_kl(log_ratio)
        logged["ratio_deviation"] = torch.expm1(log_ratio).abs().max()
        return loss, logged

    @torch.no_grad()
    def drift(self, indices: npt.NDArray[np.int64]) -> dict[str, float]:
        """Measure how far the policy is from the one that sampled the rollout, and from the pretrained one.

        It is called on micro-batches, so that this needs no more memory than an update.

        Args:
            indices: flat indices of the transitions to measure on.

        Returns:
            `kl_to_sampling`, Schulman's estimate from log-ratios, and `kl_to_pretrained`, in closed form, if the policy
            knows a pretrained one. Both are reduced over the latent as the log-density is.
        """
        knows_reference = hasattr(self.policy, "evaluate_with_reference")
        share = self.processes.share(len(indices))
        with self.processes.agreement():
            parts = [
                self.evaluate(self.rollout_buffer[part], with_reference=knows_reference)
                for part in self._micro_batches(share.of(indices))
            ]
        drift = dict.fromkeys(["kl_to_sampling"] + ["kl_to_pretrained"] * knows_reference, torch.zeros(()))
        if parts:  # more processes than transitions: some measure nothing
            drift["kl_to_sampling"] = approximate_kl(torch.cat([part.log_ratio for part in parts]))
        if reference_kl := [part.reference_kl for part in parts if part.reference_kl is not None]:
            drift["kl_to_pretrained"] = torch.cat(reference_kl).mean()
        weight = share.count / len(indices)
        return {name: float(self.processes.sum(value * weight)) for name, value in drift.items()}

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights into the policy for a while, if there are any (`ema_decay`)."""
        if self.ema is None:
            yield
            return
        self.ema.store(self._learning_parameters())
        self.ema.copy_to(self._learning_parameters())
        try:
            yield
        finally:
            self.ema.restore(self._learning_parameters())

    def _pass(self, indices: npt.NDArray[np.int64], metrics: Metrics) -> bool:
        """One epoch; False if the KL target stopped it."""
        for batch in self._batches(indices):
            if not self._update(batch, metrics):
                return False
        if self.target_kl is None or metrics["approx_kl"]:
            return True
        # A loss without log-densities says nothing of the KL: measure it once an epoch.
        return self.drift(self.random_steps(_DRIFT_ROWS))["kl_to_sampling"] <= 1.5 * self.target_kl

    def _update(self, indices: npt.NDArray[np.int64], metrics: Metrics) -> bool:
        """One optimizer step on the transitions at `indices`; False if the KL target stopped it."""
        self.policy.optimizer.zero_grad()
        own, failure = {}, None
        try:
            own = self._accumulate(indices)
        except Exception as error:
            failure = error
        for name, value in self.processes.combine(self._learning_parameters(), own, failure).items():
            if name != "ratio_deviation" or not metrics[name]:  # only the first update of an iteration is on-policy
                metrics[name].append(float(value))
        if self.target_kl is not None and metrics["approx_kl"] and metrics["approx_kl"][-1] > 1.5 * self.target_kl:
            return False
        self._step(metrics)
        return True

    def _accumulate(self, indices: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """Add up the gradients of the micro-batches that are this process's, and return its part of the metrics."""
        logged: defaultdict[str, list[Tensor]] = defaultdict(list)
        parts = self._micro_batches(indices)
        for part, share in zip(parts, self.processes.deal([len(part) for part in parts]), strict=True):
            if share is None:
                self.pass_over(len(part))
                continue
            weight = share.count / len(indices)
            with sharing(self.policy, share):
                loss, values = self.loss(self.rollout_buffer[share.of(part)])
            self.scaler.scale(loss * weight).backward()
            for name, value in values.items():
                logged[name].append(value if name == "ratio_deviation" else value * weight)
        deviations = logged.pop("ratio_deviation", [])
        largest = {"ratio_deviation": torch.stack(deviations).max()} if deviations else {}
        return largest | {name: torch.as_tensor(sum(parts)) for name, parts in logged.items()}

    def _step(self, metrics: Metrics) -> None:
        """Clip the accumulated gradient and take the optimizer's step."""
        optimizer = self.policy.optimizer
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        if not torch.isfinite(norm) and self.scaler.get_scale() <= 1:
            loss = metrics["loss"][-1] if metrics["loss"] else "not logged"
            error = FloatingPointError(
                f"the gradient is not finite after {self._n_updates} updates (loss {loss}): "
                "lower learning_rate or clip_range, or train in float32"
            )
            raise self.processes.alike(error)
        if torch.isfinite(norm):
            metrics["grad_norm"].append(float(norm))
            self._n_updates += 1
        if self.scaler.is_enabled():
            metrics["overflowed_updates"].append(float(not torch.isfinite(norm)))
        self.scaler.step(optimizer)  # skips a step whose gradient overflowed float16, and lowers the scale
        self.scaler.update()
        if self.ema is not None and torch.isfinite(norm):
            self.ema.step(self._learning_parameters())

    def _batches(self, indices: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Cut an epoch's steps into the batches of its updates.

        Where samples were dropped there are as many updates as there would have been with them, of about the same size:
        no remainder of a few steps gets an update of its own.
        """
        size = self.batch_size or len(indices)
        rollout = self.rollout_buffer
        if self.batch_size is None or not rollout.dropped_contexts:
            return [indices[start : start + size] for start in range(0, len(indices), size)]
        updates = math.ceil(len(indices) * rollout.segments.size / (len(rollout.kept_steps()) * size))
        return np.array_split(indices, min(updates, len(indices)))

    def _micro_batches(self, indices: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        size = self.micro_batch_size or self.batch_size or len(indices)
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    @torch.no_grad()
    def _recompute_log_probs(self, indices: npt.NDArray[np.int64]) -> None:
        """Compute the log-densities of the sampling policy again, in the batches in which they will be compared."""
        groups = [self._micro_batches(batch) for batch in self._batches(indices)]
        if self.n_epochs > 1:  # later epochs may choose other steps
            groups.append(self._micro_batches(np.setdiff1d(self.rollout_buffer.kept_steps(), indices)))
        rollout = self.rollout_buffer
        own = torch.zeros_like(rollout.log_probs).flatten()
        with self.processes.agreement():
            for parts in groups:
                for part, share in zip(parts, self.processes.deal([len(part) for part in parts]), strict=True):
                    if share is not None and share.count:
                        rows = share.of(part)
                        log_prob = self.evaluate(rollout[rows], with_reference=False).log_prob
                        own[copied_to(rows, rollout.device)] = log_prob
        chosen = torch.as_tensor(np.concatenate([part for parts in groups for part in parts]), device=rollout.device)
        log_probs = rollout.log_probs.flatten().clone()
        log_probs[chosen] = self.processes.sum(own)[chosen]
        rollout.log_probs = log_probs.view_as(rollout.log_probs)

    def _learning_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def _record_training(self, metrics: Metrics) -> None:
        for name, values in metrics.items():
            if values:
                self.logger.record(f"train/{name}", float(np.mean(values)))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if (share := self._share_below_epsilon()) is not None:
            self.logger.record("train/adam_epsilon_share", share)
        if self.rollout_buffer.values.any():
            kept = self.rollout_buffer.kept_steps()
            predicted = self.rollout_buffer.values.flatten().cpu().numpy()[kept]
            returns = self.rollout_buffer.returns.flatten().cpu().numpy()[kept]
            self.logger.record("train/explained_variance", float(explained_variance(predicted, returns)))

    def _share_below_epsilon(self) -> float | None:
        """Share of the weights whose gradients' RMS is below Adam's epsilon, which then sets their step."""
        optimizer = self.policy.optimizer
        moments = [state["exp_avg_sq"] for state in optimizer.state.values() if "exp_avg_sq" in state]
        if not moments:
            return None
        squared = torch.cat([moment.flatten() for moment in moments])
        return float((squared < optimizer.param_groups[0]["eps"] ** 2).float().mean())


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Return Schulman's estimate of the KL from log-ratios (http://joschu.net/blog/kl-approx.html), a scalar.

    `expm1` keeps its digits near ratio 1.
    """
    return (torch.expm1(log_ratio) - log_ratio).mean()
