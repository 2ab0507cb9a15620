"""What the algorithms of the forward process share: finished samples are noised again, x_t = α_t x_0 + σ_t ε.

An update trains on pairs of a finished sample and a timestep. The timesteps are those of the sampler: for each sample
the ones inside `timestep_window`, or a random `timestep_fraction` of them, each with noise of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.training_utils import EMAModel
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn import functional

from agents.algorithms.whole_episodes import WholeEpisodesAlgorithm
from agents.distributed import Metric, Rows
from agents.policy.weight_copies import LAGGING, LaggingWeights, using_weights
from agents.rollout.buffer import TensorRolloutBuffer, Transitions
from agents.rollout.timesteps import choose_steps
from ddpo_env.sampler.denoising_loss import NoisedSamples
from ddpo_env.tensors import copied_to
from ddpo_env.validation.options import DECAY, Range, check_value


class ForwardProcessAlgorithm(WholeEpisodesAlgorithm):
    """Base of the algorithms that train a denoiser on noised samples: implement `loss`.

    `kl_coef` is the weight of the squared distance of the denoiser's output from the pretrained one's, mean over the
    latent, at the noised samples.

    Raises:
        ValueError: for a policy without a denoiser, or an `n_steps` that cuts episodes.
    """

    compares_with_sampling = False
    needs_log_probs = False
    penalises_steps = False

    def _setup_model(self) -> None:
        super()._setup_model()
        if not self.abilities.has_forward_process:
            raise ValueError(
                f"policy must be a denoiser such as DiffusionPolicy with {type(self).__name__}, which adds noise to "
                f"finished samples and trains the prediction of them (PolicyAbilities.has_forward_process); got a "
                f"{type(self.policy).__name__}"
            )
        self.check_episodes()
        if self.ent_coef:
            raise ValueError(f"ent_coef must be 0 with {type(self).__name__}, whose loss has none; got {self.ent_coef}")

    def select_steps(self) -> npt.NDArray[np.int64]:
        """Return the steps whose timesteps an epoch trains on; a step without noise will do as well."""
        options, rng = self.options, self.generators.numpy
        return choose_steps(self.rollout_buffer.segments, options.timestep_fraction, options.timestep_window, rng)

    def transitions(self, indices: npt.NDArray[np.int64]) -> Transitions:
        """Return transitions at flat indices, with the finished sample of each one's trajectory as its action."""
        rollout = self.rollout_buffer
        return replace(rollout[indices], actions=self.samples(self.finished_by(indices)))

    def samples(self, finished: npt.NDArray[np.int64]) -> Tensor:
        """Return the samples that the last steps at flat indices finished, `(batch, *action_shape)`."""
        rollout = self.rollout_buffer
        return rollout.actions.flatten(0, 1)[copied_to(finished, rollout.device)]

    def finished_by(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the flat indices of the last steps of the trajectories that the steps at `indices` belong to.

        Raises:
            ValueError: if a trajectory goes on after the rollout.
        """
        return self.last_steps()[self.rollout_buffer.segments.ravel()[indices]]

    def last_steps(self) -> npt.NDArray[np.int64]:
        """Return the flat index of the last step of each trajectory, `(len(rollout_buffer.contexts),)`.

        Raises:
            ValueError: if a trajectory goes on after the rollout.
        """
        rollout = self.rollout_buffer
        final = rollout.final_steps()
        last = np.full(len(rollout.contexts), -1)
        last[rollout.segments.ravel()[final]] = final
        if (last < 0).any():
            raise ValueError(
                f"n_steps={rollout.buffer_size} cuts episodes, and {type(self).__name__} trains on finished samples: "
                "n_steps must be a multiple of the episode's length (num_inference_steps)"
            )
        return last

    def noised(self, batch: Transitions) -> NoisedSamples:
        """Return the finished samples of a batch with new noise of its timesteps."""
        return self.abilities.noised(batch, self.new_noise(len(batch.actions)))

    def new_noise(self, count: int) -> Tensor:
        """Return standard normal noise for the samples that this process computes, `(count, *action_shape)`."""
        rows = self.abilities.rows or Rows.of_process(count, 0, 1)
        return rows.draw(self._noise)

    def advance_rng(self, rows: int) -> None:
        """Draw the noise of `rows` samples."""
        self._noise(rows)

    def _noise(self, rows: int) -> Tensor:
        shape = self.rollout_buffer.actions.shape[2:]
        return torch.randn(rows, *shape, device=self.device, generator=self.abilities.generator)

    def penalised(
        self,
        matching_loss: Tensor,
        output: Tensor,
        noised: NoisedSamples,
        batch: Transitions,
        pretrained: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return an algorithm's own loss plus the terms of all of them (distance from the pretrained denoiser, critic).

        Args:
            matching_loss: scalar.
            output: of the denoiser, `(batch, ...)`.
            noised: what the output is for.
            batch: out of `transitions`.
            pretrained: the pretrained denoiser's output, where the algorithm has it already.

        Returns:
            The loss, a scalar, and metrics.
        """
        loss = matching_loss
        logged: dict[str, Metric] = {"matching_loss": matching_loss.detach()}
        if kl_coef := self.options.kl_coef:
            if pretrained is None:
                with torch.no_grad():
                    pretrained = self.abilities.noised_output(noised, pretrained=True)
            penalty = kl_coef * functional.mse_loss(output, pretrained)
            loss = loss + penalty
            logged["kl_penalty"] = penalty.detach()
        values = self.policy.predict_values(batch.observations).flatten()
        if values.requires_grad:
            value_loss = functional.mse_loss(values, batch.returns)
            loss = loss + self.vf_coef * value_loss
            logged["value_loss"] = value_loss.detach()
        return loss, logged | {"loss": loss.detach()}


class LaggingAlgorithm(ForwardProcessAlgorithm):
    """An algorithm that keeps a copy of what learns, which follows it more slowly: `LaggingWeights`.

    The copy moves at the end of each iteration. Before the first update it is the policy itself, whatever weights that
    was given.

    Args:
        *arguments: of `TensorOnPolicyAlgorithm`.
        lag_rate: growth of the copy's decay with each update.
        lag_limit: largest decay of the copy.
        **named: of `TensorOnPolicyAlgorithm`.
    """

    def __init__(self, *arguments: Any, lag_rate: float, lag_limit: float, **named: Any) -> None:
        check_value("lag_rate", lag_rate, Annotated[float, Range(at_least=0, at_most=1)])
        check_value("lag_limit", lag_limit, Annotated[float, DECAY])
        self.lag_rate, self.lag_limit = lag_rate, lag_limit
        super().__init__(*arguments, **named)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.lagging = LaggingWeights(self._learning_parameters(), self.lag_rate, self.lag_limit)

    def averages(self) -> dict[str, EMAModel]:
        """Return the averages of the weights that a checkpoint must contain, the copy among them."""
        return super().averages() | {LAGGING: self.lagging}

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: TensorRolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Collect a rollout; see `RolloutAlgorithm.collect_rollouts`."""
        if self._n_updates == 0:
            self.lagging.restart(self._learning_parameters())
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def train(self) -> None:
        """Update the policy on the rollout, and let the copy follow."""
        super().train()
        self.lagging.follow(self._learning_parameters(), self._n_updates)

    @contextmanager
    def as_lagging(self) -> Iterator[None]:
        """Compute with the copy's weights inside this context."""
        with using_weights(self._learning_parameters(), self.lagging.shadow_params):
            yield

    @torch.no_grad()
    def lagging_output(self, noised: NoisedSamples) -> Tensor:
        """Return the copy's output for noised samples, `(batch, ...)`."""
        with self.as_lagging():
            return self.abilities.noised_output(noised)
