"""AWM: advantage weighted matching (Xue et al. 2025, arXiv 2509.25050, section 4).

    ℓ_θ        = ‖out_θ(x_t, t, c) − target‖²                           the denoising loss of pretraining
    log p_θ    = −(s / p) [(ℓ_θ + 1e-10)^p − (1e-10)^p],                p = ¼;  s = σ_t / (α_t + σ_t), a flow's time
    ρ          = p_θ / p_sampling, at the same noise
    L          = −E[ min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â) ],               Â = clip(A / A_max, −1, 1)
                 + lag_coef · ‖out_θ − out_lagging‖²  +  kl_coef · ‖out_θ − out_pretrained‖²
    θ_lagging  ← d θ_lagging + (1 − d) θ,    d = min(0.001 n, 0.3)      after each iteration; n updates so far

The denoising loss stands for a log-probability, so this is a policy gradient on the loss of pretraining. In the first
update of an iteration ρ is 1, and its gradient that of log p_θ. All norms are means over the latent. The power is that
of the authors' code (`ghuber`).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor
from torch.nn import functional

from agents.algorithms.forward.forward_process import LaggingAlgorithm
from agents.algorithms.policy_gradient.trust_region import clipped_surrogate
from agents.distributed import Metric
from agents.policy.weight_copies import WeightSnapshot
from agents.rollout.buffer import Transitions
from ddpo_env.sampler.denoising_loss import NoisedSamples
from ddpo_env.validation.options import POSITIVE, Range, check_value

_SMALLEST_LOSS = 1e-10


class AWM(LaggingAlgorithm):
    """Advantage weighted matching with interchangeable advantages.

    Args:
        policy: `DiffusionPolicy`, or another policy with a denoiser. The paper has no guidance (`guidance_scale=1`).
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout, a multiple of the episode's length; default: one episode.
        batch_size: pairs of a sample and a timestep in one update; default: all of the rollout.
        n_epochs: passes over the rollout.
        clip_range: ε of the ratio. It has an effect from the second update of an iteration on.
        advantage_clip: A_max.
        power: p; 1 is the plain denoising loss, and less weakens the pairs with a large one.
        lag_coef: weight of the distance from the lagging copy of the weights.
        lag_rate: growth of the copy's decay d with each update.
        lag_limit: largest d.
        **arguments: of `TensorOnPolicyAlgorithm`: `micro_batch_size`, `kl_coef`, `timestep_fraction`, ...; and of
            `RolloutAlgorithm`: `advantage`, `policy_kwargs`, `seed`, `device`, ...

    Raises:
        ValueError: for an argument that is not valid, or a policy without a denoiser.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int | None = None,
        batch_size: int | None = None,
        n_epochs: int = 1,
        clip_range: float = 1.0,
        advantage_clip: float = 5.0,
        power: float = 0.25,
        lag_coef: float = 1.0,
        lag_rate: float = 0.001,
        lag_limit: float = 0.3,
        **arguments: Any,
    ) -> None:
        check_value("clip_range", clip_range, Annotated[float, POSITIVE])
        check_value("advantage_clip", advantage_clip, Annotated[float, POSITIVE])
        check_value("power", power, Annotated[float, Range(above=0, at_most=1)])
        check_value("lag_coef", lag_coef, Annotated[float, Range(at_least=0, at_most=1e6)])
        self.clip_range, self.advantage_clip, self.power, self.lag_coef = clip_range, advantage_clip, power, lag_coef
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            lag_rate=lag_rate,
            lag_limit=lag_limit,
            **arguments,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        self._sampled = WeightSnapshot()

    def train(self) -> None:
        """Update the policy on the rollout; later updates compare it with what it is now."""
        has_later_updates = self.n_epochs > 1 or self.batch_size is not None
        self._sampled = WeightSnapshot(self._learning_parameters() if has_later_updates else [], self._n_updates)
        super().train()

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return the clipped surrogate objective on the denoising loss, negative, and the other terms; and metrics."""
        noised = self.noised(batch)
        sampled = self._sampled_log_prob(noised)
        lagging = self.lagging_output(noised) if self.lag_coef else None
        output = self.abilities.noised_output(noised)
        log_prob = self._log_prob(noised, output)
        ratio = torch.exp(log_prob - (log_prob.detach() if sampled is None else sampled))
        advantages = (batch.advantages / self.advantage_clip).clamp(-1, 1)
        objective, own = clipped_surrogate(ratio, advantages, self.clip_range)
        loss, logged = self.penalised(-objective.mean(), output, noised, batch)
        if lagging is not None:
            distance = functional.mse_loss(output, lagging)
            loss = loss + self.lag_coef * distance
            logged["lag_distance"] = distance.detach()
        return loss, logged | own | {"loss": loss.detach()}

    def _sampled_log_prob(self, noised: NoisedSamples) -> Tensor | None:
        """Return what stands for log-probabilities under the policy that sampled; `None` while it is the current one.

        `(batch,)`.
        """
        if self._sampled.is_current(self._n_updates):
            return None
        with torch.no_grad(), self._sampled.in_use():
            return self._log_prob(noised, self.abilities.noised_output(noised))

    def _log_prob(self, noised: NoisedSamples, output: Tensor) -> Tensor:
        """Return what stands for the log-probability of the samples, `(batch,)`."""
        error = (noised.denoising_loss(output) + _SMALLEST_LOSS) ** self.power - _SMALLEST_LOSS**self.power
        return -noised.noise_fraction / self.power * error
