"""What an algorithm may ask of a policy beyond Stable-Baselines3's interface, and the answers of a stock policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from agents.distributed import Rows
from agents.policy.distribution import DenoisingDistribution
from agents.rollout.buffer import TensorRolloutBuffer, Transitions
from agents.rollout.shared_prefix import EqualRows
from ddpo_env.models import DiffusionModel
from ddpo_env.sampler.denoising_loss import NoisedSamples
from ddpo_env.sampler.gaussian_sampler import GaussianSampler


@dataclass(frozen=True)
class StepMove:
    """How far steps of the sampler have moved from those of the policy that sampled.

    Attributes:
        divergence: `‖μ_θ − μ_sampling‖² / 2 std²`, reduced like the log-probability, `(batch,)`. It has a gradient.
        std: of the steps, `(batch,)`.
        flow_step: Δ of the steps, see `GaussianSampler`, `(batch,)`.
    """

    divergence: Tensor
    std: Tensor
    flow_step: Tensor


@dataclass(frozen=True)
class PolicyEvaluation:
    """Some transitions, evaluated under the current policy.

    Attributes:
        values: the critic's values, `(batch,)`.
        log_prob: log-probabilities of the actions, `(batch,)`.
        log_ratio: `log_prob` minus the log-probability under the policy that sampled them, `(batch,)`.
        entropy: `(batch,)`.
        reference_kl: KL divergence from the pretrained policy, `(batch,)`; `None` where it was not computed.
        move: from the policy that sampled; `None` where it was not computed.
    """

    values: Tensor
    log_prob: Tensor
    log_ratio: Tensor
    entropy: Tensor
    reference_kl: Tensor | None
    move: StepMove | None = None


class PolicyAbilities:
    """Abilities of a policy, with defaults: a policy derives from this class and overrides what it can do.

    Attributes:
        knows_reference: whether there is a pretrained policy (`evaluate_with_reference`), which a KL penalty needs.
        shares_batches: whether several processes can compute the rows of one batch (`computing`).
        has_forward_process: whether the policy is a denoiser, whose samples can be noised again (`noised`).
        draws_from_generator: whether all noise comes from `generator`. Otherwise the algorithm puts its own states in
            the place of torch's global generators while it calls the policy.
        rows: the rows that are computed now, inside `computing`.
        generator: what noise is drawn from, inside `computing`; `None`: torch's global generator.
        equal_rows: groups of rows that are equal, which may be computed once each, inside `computing`; `None`: there
            are none. The noise of actions is drawn for every row.
    """

    knows_reference: bool = False
    shares_batches: bool = False
    has_forward_process: bool = False
    draws_from_generator: bool = False
    rows: Rows | None = None
    generator: torch.Generator | None = None
    equal_rows: EqualRows | None = None
    evaluate_actions: Callable[..., tuple[Tensor, Tensor, Tensor | None]]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the policy's network computes."""
        return torch.float32

    @property
    def has_critic(self) -> bool:
        """Whether the policy predicts values; without a critic they are all 0."""
        return True

    def sampling_weights(self) -> AbstractContextManager[None]:
        """Return a context for many calls without gradients, in which the weights do not change."""
        return nullcontext()

    @contextmanager
    def computing(
        self, rows: Rows, generator: torch.Generator | None = None, equal_rows: EqualRows | None = None
    ) -> Iterator[None]:
        """Compute some rows of a batch inside this context, and draw noise for all of them from `generator`."""
        self.rows, self.generator, self.equal_rows = rows, generator, equal_rows
        try:
            yield
        finally:
            self.rows = self.generator = self.equal_rows = None

    def stochastic_steps(self) -> npt.NDArray[np.bool_] | None:
        """Return which steps of an episode have noise, `(steps,)` on the host; `None`: all, however many there are."""
        return None

    def scored(self, obs: Any) -> Tensor | None:
        """Return whether the actions of an observation have log-probabilities, `(batch,)` bool; `None`: all have."""
        return None

    @contextmanager
    def noise_within(self, window: tuple[int, int] | None) -> Iterator[None]:
        """Act without noise outside of `window`, the first step and one past the last, inside this context.

        Only for a policy with `stochastic_steps`. `None` changes nothing.
        """
        yield

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

    def noised(self, batch: Transitions, noise: Tensor) -> NoisedSamples:
        """Return the samples in a batch's actions with noise of its timesteps; only with `has_forward_process`."""
        raise TypeError(f"{type(self).__name__} has no denoiser, so it cannot noise samples (has_forward_process)")

    def noised_output(self, noised: NoisedSamples, pretrained: bool = False) -> Tensor:
        """Return the output of the denoiser for noised samples, or the pretrained one's; latent-shaped, float32."""
        raise TypeError(f"{type(self).__name__} has no denoiser, so it has no output (has_forward_process)")

    def advance_rng(self, rows: int) -> None:
        """Draw the random numbers that `regression_loss` draws for `rows` transitions: none."""


class SamplerAbilities(PolicyAbilities):
    """Abilities of a policy whose actions are the steps of a sampler, some of which may have no noise.

    Attributes:
        model: whose steps they are.
        num_inference_steps: of an episode.
        sampler: the table of the steps that the policy takes now.
        critic: predicts values; `None`: there is none.
        predict_output: called with latents, timesteps, conditioning and, if it is not the one that learns, a denoiser;
            returns the guided output, latent-shaped.
        get_distribution: returns the distribution over the next latents of an observation.
        reference_kl: returns the divergence of such a distribution from the pretrained policy's, `(batch,)`.
    """

    model: DiffusionModel
    num_inference_steps: int
    sampler: GaussianSampler
    critic: nn.Module | None
    predict_output: Callable[..., Tensor]
    get_distribution: Callable[..., DenoisingDistribution]
    reference_kl: Callable[[Any, DenoisingDistribution], Tensor]
    _host_sampler: GaussianSampler
    _stochastic_steps: npt.NDArray[np.bool_]

    @property
    def has_critic(self) -> bool:
        """Whether the policy predicts values."""
        return self.critic is not None

    def use_sampler(self, table: GaussianSampler) -> None:
        """Take the steps of a table on the host, which moves to the device when it is used."""
        self.sampler = self._host_sampler = table
        self._stochastic_steps = table.is_stochastic.numpy()

    def sampler_on(self, device: torch.device) -> GaussianSampler:
        """Return the table on a device."""
        if self.sampler.std.device != device:
            self.sampler = self.sampler.to(device)
        return self.sampler

    def move_of(self, distribution: DenoisingDistribution, sampling_mean: Tensor) -> StepMove:
        """Return how far a distribution is from the one with the mean of the policy that sampled, `(batch, ...)`."""
        step = distribution.step_index
        sampler = distribution.sampler
        return StepMove(distribution.kl_divergence(sampling_mean), sampler.std[step], sampler.flow_step[step])

    def stochastic_steps(self) -> npt.NDArray[np.bool_]:
        """Return which steps have noise, `(steps,)` on the host."""
        return self._stochastic_steps

    def scored(self, obs: Any) -> Tensor | None:
        """Return whether the actions of an observation have log-probabilities, `(batch,)` bool; `None`: all have."""
        if self._stochastic_steps.all():
            return None
        timestep = obs["timestep"].flatten()
        sampler = self.sampler_on(timestep.device)
        return sampler.is_stochastic[sampler.step_index_of(timestep)]

    @contextmanager
    def noise_within(self, window: tuple[int, int] | None) -> Iterator[None]:
        """Take the sampler's steps inside `window` and deterministic ones outside, inside this context."""
        if window is None:
            yield
            return
        whole = self._host_sampler
        ode = GaussianSampler.from_model(self.model, self.num_inference_steps, sampler="ode")
        self.use_sampler(whole.windowed(*window, ode))
        try:
            yield
        finally:
            self.use_sampler(whole)


class _StockAbilities(PolicyAbilities):
    """The defaults, for a policy that does not derive from `PolicyAbilities`."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._policy = policy

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Call the policy with flat actions, as Stable-Baselines3's buffers hold them."""
        is_discrete = isinstance(self._policy.action_space, spaces.Discrete)
        return self._policy.evaluate_actions(obs, actions if is_discrete else actions.reshape(len(actions), -1))


def policy_abilities(policy: ActorCriticPolicy) -> PolicyAbilities:
    """Return the policy's abilities: the policy itself if it declares them, else the defaults."""
    return policy if isinstance(policy, PolicyAbilities) else _StockAbilities(policy)
