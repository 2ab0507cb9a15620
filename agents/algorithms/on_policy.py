"""The update that all algorithms of this package share; an algorithm adds its `loss`.

One iteration (`RolloutAlgorithm.iterate`):

    rollout = sample n_steps of every sub-environment with the current policy, and score the samples
              (with noise in the steps of noise_window only, if there is one)
    weights = advantages of the rollout's steps
    for each epoch:
        steps = the steps inside timestep_window, a random timestep_fraction of each episode's, shuffled
        for batch in steps, batch_size at a time:                   one optimizer step
            for micro_batch in batch, micro_batch_size at a time:   gradients add up
                loss(micro_batch).backward()
            clip the gradient; optimizer.step(); update the averaged weights
            stop early if the estimated KL from the sampling policy exceeds target_kl
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from diffusers.training_utils import EMAModel
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import explained_variance
from torch import Tensor
from torch.nn import functional

from agents.algorithms.options import UpdateOptions, check_noise, check_whole_episodes
from agents.algorithms.rollout_algorithm import RolloutAlgorithm
from agents.distributed import Maximum, Metric, Rows
from agents.policy.abilities import PolicyEvaluation
from agents.policy.weight_copies import AVERAGE, using_weights
from agents.rollout.buffer import DROPPED, Transitions
from agents.rollout.timesteps import choose_steps, measured_steps
from ddpo_env.tensors import copied_to, read_numbers
from ddpo_env.validation.options import Range, check_value, shows_options, split_options

Metrics = defaultdict[str, list[float]]


class TensorOnPolicyAlgorithm(RolloutAlgorithm):
    """Base of the algorithms here: implement `loss`.

    Args:
        policy: policy class, or `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`.
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout.
        batch_size: transitions in one update; default: all that are trained on.
        micro_batch_size: transitions in one call of the policy; the gradients of an update's calls are added up.
            Default: `batch_size`.
        n_epochs: passes over the rollout.
        **arguments: the fields of `UpdateOptions` (`timestep_fraction`, `timestep_window`, `kl_coef`, `target_kl`,
            `ema_decay`, ...) and the arguments of `RolloutAlgorithm` (`gamma`, `advantage`, `policy_kwargs`, ...).

    Attributes:
        options: the `UpdateOptions`.

    Raises:
        ValueError: for an argument that is not valid.
    """

    compares_with_sampling: ClassVar[bool] = True
    """Whether the loss compares the policy with the one that sampled, by the rollout's log-probabilities."""
    needs_log_probs: ClassVar[bool] = True
    """Whether the loss trains on log-probabilities, which steps without noise do not have."""

    @shows_options(UpdateOptions)
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        *,
        learning_rate: float | Schedule,
        n_steps: int,
        batch_size: int | None = None,
        n_epochs: int = 1,
        micro_batch_size: int | None = None,
        **arguments: Any,
    ) -> None:
        check_value("n_epochs", n_epochs, Annotated[int, Range(at_least=1, at_most=100_000)])
        for name, size in {"batch_size": batch_size, "micro_batch_size": micro_batch_size}.items():
            check_value(name, size, Annotated[int | None, Range(at_least=1, at_most=10**9)])
        self.options, arguments = split_options(UpdateOptions, arguments)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.n_epochs = n_epochs
        self.ema: EMAModel | None = None
        self._n_updates = 0
        super().__init__(policy, env, learning_rate=learning_rate, n_steps=n_steps, **arguments)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.options.kl_coef and not self.abilities.knows_reference:
            raise ValueError(
                f"kl_coef must be 0 for a {type(self.policy).__name__}, which has no pretrained policy to compare with "
                f"(PolicyAbilities.knows_reference); got {self.options.kl_coef}"
            )
        needs = self.needs_log_probs, self.penalises_steps
        stochastic, window = self.abilities.stochastic_steps(), self.options.timestep_window
        check_noise(self.options, stochastic, type(self).__name__, *needs)
        if window != (0.0, 1.0):
            check_whole_episodes(self.n_steps, stochastic, f"timestep_window={window}, fractions of an episode")
        compute_dtype = self.abilities.compute_dtype
        recompute, is_half = self.options.recompute_log_probs, compute_dtype != torch.float32
        self.recomputes_log_probs = self.compares_with_sampling and is_half if recompute is None else recompute
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=compute_dtype == torch.float16)
        if self.options.ema_decay and self.ema is None:
            self.ema = EMAModel(self._learning_parameters(), decay=self.options.ema_decay)

    @abstractmethod
    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return the loss of some transitions, and metrics by name.

        A metric is a scalar tensor, averaged over the transitions, or a `Maximum`.
        """

    def advance_rng(self, rows: int) -> None:
        """Draw the random numbers that `loss` draws for `rows` transitions that another process computes."""

    @contextmanager
    def sampling(self, rollout: int) -> Iterator[None]:
        """Sample with noise in this iteration's window only, if there is one, inside this context."""
        steps = self.abilities.stochastic_steps()
        window = None if steps is None else self.options.noise_window_at(rollout, len(steps))
        with super().sampling(rollout), self.abilities.noise_within(window):
            yield

    def select_steps(self) -> npt.NDArray[np.int64]:
        """Return the flat indices of the rollout's steps that an epoch trains on: none without a log-probability."""
        return self._scored_steps(self.options.timestep_fraction)

    def random_steps(self, count: int) -> npt.NDArray[np.int64]:
        """Return flat indices of up to `count` random steps inside `timestep_window` that have a log-probability."""
        return self.generators.numpy.permutation(self._scored_steps(1.0))[:count]

    def _scored_steps(self, fraction: float) -> npt.NDArray[np.int64]:
        rollout, window = self.rollout_buffer, self.options.timestep_window
        return choose_steps(rollout.segments, fraction, window, self.generators.numpy, rollout.scored)

    def train(self) -> None:
        """Update the policy on the rollout: `n_epochs` passes in batches of `batch_size` transitions."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        metrics: Metrics = defaultdict(list)
        for epoch in range(self.n_epochs):
            indices = self.generators.numpy.permutation(self.select_steps())
            if epoch == 0 and self.recomputes_log_probs and len(indices):
                self._recompute_log_probs(indices)
            if not self._pass(indices, metrics):
                break
        for name, value in self.drift(self.random_steps(measured_steps(len(indices), self._rollouts))).items():
            if not math.isfinite(value):
                fault = f"train/{name} is {value} after {self._n_updates} updates: lower learning_rate"
                raise self.processes.mark_agreed(FloatingPointError(fault))
            metrics[name].append(value)
        self._record_training(metrics)

    def evaluate(self, batch: Transitions, with_reference: bool | None = None) -> PolicyEvaluation:
        """Evaluate transitions under the current policy.

        Args:
            batch: out of the rollout buffer.
            with_reference: whether to run the pretrained policy too; default: if there is a KL penalty.
        """
        reference_kl = None
        if self.options.kl_coef > 0 if with_reference is None else with_reference:
            evaluated = self.abilities.evaluate_with_reference(batch.observations, batch.actions)
            values, log_prob, entropy, reference_kl = evaluated
        else:
            values, log_prob, entropy = self.abilities.evaluate_actions(batch.observations, batch.actions)
        entropy = -log_prob if entropy is None else entropy  # a distribution without a closed form
        return PolicyEvaluation(values.flatten(), log_prob, log_prob - batch.log_probs, entropy, reference_kl)

    def regularized(
        self, policy_loss: Tensor, policy: PolicyEvaluation, batch: Transitions
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return a policy's loss plus the terms of every algorithm (critic, entropy bonus, KL penalty), and metrics."""
        loss = policy_loss
        logged: dict[str, Metric] = {"policy_gradient_loss": policy_loss.detach()}
        if policy.values.requires_grad:
            value_loss = functional.mse_loss(policy.values, batch.returns)
            loss = loss + self.vf_coef * value_loss
            logged["value_loss"] = value_loss.detach()
        entropy_loss = -policy.entropy.mean()
        loss = loss + self.ent_coef * entropy_loss
        logged["entropy_loss"] = entropy_loss.detach()
        if policy.reference_kl is not None:
            penalty = policy.reference_kl.mean()
            loss = loss + self.options.kl_coef * penalty
            logged["kl_penalty"] = self.options.kl_coef * penalty.detach()
        log_ratio = policy.log_ratio.detach()
        logged |= {"loss": loss.detach(), "approx_kl": approximate_kl(log_ratio)}
        return loss, logged | {"ratio_deviation": Maximum(torch.expm1(log_ratio).abs().max())}

    @torch.no_grad()
    def drift(self, indices: npt.NDArray[np.int64]) -> dict[str, float]:
        """Measure how far the policy is from the one that sampled the rollout, and from the pretrained one.

        The policy is called on micro-batches, so this needs no more memory than an update.

        Args:
            indices: flat indices of the transitions to measure on.

        Returns:
            `kl_to_sampling`, estimated from log-ratios (`approximate_kl`), and `kl_to_pretrained`, in closed form, if
            the policy knows a pretrained one. Both are reduced over the latent like the log-probability. Nothing
            without transitions, as where no step has noise.
        """
        if not len(indices):
            return {}
        knows_reference = self.abilities.knows_reference
        rows = self.processes.rows(len(indices))
        with self.processes.fail_together():
            evaluated = [
                self.evaluate(self.rollout_buffer[micro_batch], with_reference=knows_reference)
                for micro_batch in self._micro_batches(rows.of(indices))
            ]
        drift = dict.fromkeys(["kl_to_sampling"] + ["kl_to_pretrained"] * knows_reference, torch.zeros(()))
        if evaluated:  # with more processes than transitions some measure nothing
            drift["kl_to_sampling"] = approximate_kl(torch.cat([one.log_ratio for one in evaluated]))
        if reference_kl := [one.reference_kl for one in evaluated if one.reference_kl is not None]:
            drift["kl_to_pretrained"] = torch.cat(reference_kl).mean()
        weight = rows.count / len(indices)
        return read_numbers({name: self.processes.sum(value * weight) for name, value in drift.items()})

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the averaged weights inside this context, if there are any (`ema_decay`)."""
        average = None if self.ema is None else self.ema.shadow_params
        with using_weights(self._learning_parameters(), average):
            yield

    def averages(self) -> dict[str, EMAModel]:
        """Return the averages of the weights that a checkpoint must contain, by their names in `weight_copies`."""
        return {} if self.ema is None else {AVERAGE: self.ema}

    def transitions(self, indices: npt.NDArray[np.int64]) -> Transitions:
        """Return what `loss` is given for the chosen steps: the rollout's transitions at flat indices."""
        return self.rollout_buffer[indices]

    def _pass(self, indices: npt.NDArray[np.int64], metrics: Metrics) -> bool:
        """Run one epoch; return False if the KL target stopped it."""
        count = max(1, measured_steps(len(indices), self._rollouts))
        batches = self._batches(indices)
        return not any(self._is_beyond_target(count, metrics) or not self._update(one, metrics) for one in batches)

    def _is_beyond_target(self, count: int, metrics: Metrics) -> bool:
        """Measure the KL on `count` steps before each update but the first, where the loss does not show it."""
        target_kl = self.options.target_kl
        if target_kl is None or metrics["approx_kl"] or not any(metrics.values()):
            return False
        return self.drift(self.random_steps(count))["kl_to_sampling"] > 1.5 * target_kl

    def _update(self, indices: npt.NDArray[np.int64], metrics: Metrics) -> bool:
        """Take one optimizer step on the transitions at `indices`; return False if the KL target stopped it."""
        self.policy.optimizer.zero_grad()
        own: dict[str, Metric] = {}
        failure: BaseException | None = None
        try:
            own = self._accumulate(indices)
        except BaseException as error:  # SystemExit too: the other processes would wait
            failure = error
        for name, value in read_numbers(self.processes.combine(self._learning_parameters(), own, failure)).items():
            if name != "ratio_deviation" or not metrics[name]:  # only the first update of an iteration is on-policy
                metrics[name].append(value)
        target_kl = self.options.target_kl
        if target_kl is not None and metrics["approx_kl"] and metrics["approx_kl"][-1] > 1.5 * target_kl:
            return False
        self._step(metrics)
        return True

    def _accumulate(self, indices: npt.NDArray[np.int64]) -> dict[str, Metric]:
        """Add up the gradients of this process's micro-batches, and return its contribution to the metrics."""
        sums: defaultdict[str, list[Tensor]] = defaultdict(list)
        largest: defaultdict[str, list[Tensor]] = defaultdict(list)
        micro_batches = self._micro_batches(indices)
        calls = self.processes.assign_calls([len(micro_batch) for micro_batch in micro_batches])
        for micro_batch, rows in zip(micro_batches, calls, strict=True):
            if rows is None:
                with self.abilities.computing(Rows.of_process(len(micro_batch), 0, 1), self.generators.noise):
                    self.advance_rng(len(micro_batch))
                continue
            weight = rows.count / len(indices)
            with self.abilities.computing(rows, self.generators.noise):
                loss, metrics = self.loss(self.transitions(rows.of(micro_batch)))
            self.scaler.scale(loss * weight).backward()
            del loss  # the next call would have its graph in memory too
            for name, metric in metrics.items():
                if isinstance(metric, Maximum):
                    largest[name].append(metric.value)
                else:
                    sums[name].append(metric * weight)
        combined: dict[str, Metric] = {name: Maximum(torch.stack(values).max()) for name, values in largest.items()}
        return combined | {name: torch.as_tensor(sum(values)) for name, values in sums.items()}

    def _step(self, metrics: Metrics) -> None:
        """Clip the accumulated gradient and take the optimizer's step."""
        optimizer = self.policy.optimizer
        self.scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm))
        if not math.isfinite(norm) and self.scaler.get_scale() <= 1:
            loss = metrics["loss"][-1] if metrics["loss"] else "not logged"
            error = FloatingPointError(
                f"the gradient is not finite after {self._n_updates} updates (loss {loss}): "
                "lower learning_rate, or train in float32"
            )
            raise self.processes.mark_agreed(error)
        if math.isfinite(norm):
            metrics["grad_norm"].append(norm)
            self._n_updates += 1
        if self.scaler.is_enabled():
            metrics["overflowed_updates"].append(float(not math.isfinite(norm)))
        self.scaler.step(optimizer)  # skips a step whose gradient overflowed float16, and lowers the scale
        self.scaler.update()
        if self.ema is not None and math.isfinite(norm):
            self.ema.step(self._learning_parameters())

    def _batches(self, indices: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Cut an epoch's steps into the batches of its updates.

        Where samples were dropped there are as many updates as there would have been with them, of about the same size,
        so that no small remainder gets an update of its own.
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
        """Compute the sampling policy's log-probabilities again, in the batches in which they will be compared."""
        groups = [self._micro_batches(batch) for batch in self._batches(indices)]
        if self.n_epochs > 1:  # later epochs may choose other steps
            scored = np.flatnonzero(self.rollout_buffer.scored & (self.rollout_buffer.segments != DROPPED))
            if len(later := np.setdiff1d(scored, indices)):
                groups.append(self._micro_batches(later))
        rollout = self.rollout_buffer
        own = torch.zeros_like(rollout.log_probs).flatten()
        with self.processes.fail_together():
            for group in groups:
                calls = self.processes.assign_calls([len(micro_batch) for micro_batch in group])
                for micro_batch, rows in zip(group, calls, strict=True):
                    if rows is not None and rows.count:
                        chosen = rows.of(micro_batch)
                        log_prob = self.evaluate(rollout[chosen], with_reference=False).log_prob
                        own[copied_to(chosen, rollout.device)] = log_prob
        recomputed = torch.as_tensor(np.concatenate([one for group in groups for one in group]), device=rollout.device)
        log_probs = rollout.log_probs.flatten().clone()
        log_probs[recomputed] = self.processes.sum(own)[recomputed]
        rollout.log_probs = log_probs.view_as(rollout.log_probs)

    def _learning_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def _record_training(self, metrics: Metrics) -> None:
        for name, values in metrics.items():
            if values:
                self.logger.record(f"train/{name}", float(np.mean(values)))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if (fraction := self._fraction_below_epsilon()) is not None:
            self.logger.record("train/adam_epsilon_fraction", fraction)
        if self.rollout_buffer.values.any():
            kept = self.rollout_buffer.kept_steps()
            predicted = self.rollout_buffer.values.flatten().cpu().numpy()[kept]
            returns = self.rollout_buffer.returns.flatten().cpu().numpy()[kept]
            self.logger.record("train/explained_variance", float(explained_variance(predicted, returns)))

    def _fraction_below_epsilon(self) -> float | None:
        """Return the fraction of the weights whose gradient RMS is below Adam's epsilon: it limits their step."""
        group, states = self.policy.optimizer.param_groups[0], self.policy.optimizer.state.values()
        moments = [(state["exp_avg_sq"], state["step"]) for state in states if "exp_avg_sq" in state]
        if not moments:
            return None
        squared = torch.cat([(average / (1 - group["betas"][1] ** step)).flatten() for average, step in moments])
        return float((squared < group["eps"] ** 2).float().mean())


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Return the mean of `expm1(r) − r` over log-ratios `r`, a scalar.

    Schulman's estimate of the KL divergence (http://joschu.net/blog/kl-approx.html); `expm1` keeps digits near ratio 1.
    """
    return (torch.expm1(log_ratio) - log_ratio).mean()
