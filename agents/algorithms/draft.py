"""DRaFT-K: the reward is differentiated through the decoder and the last K steps (Clark et al. 2023, arXiv 2309.17400).

    L    = −E[ r(decode(x_0), c) ] + kl_coef · Σ ‖out_θ − out_pretrained‖² / K
    x_s' = μ_θ(x_s, s, c) + σ_s ε_s           for the last K steps; x_K, where they begin, has no gradient

A rollout gives x_K and the noise ε of its steps. The update takes the last K steps again from there, with gradients,
and differentiates the environment's decoder and reward too. So a sample says in which direction it gets better, where a
policy gradient knows only how good it was. The squared distance is a mean over the latent. AlignProp (Prabhudesai et
al. 2023, arXiv 2310.03739) goes back a random number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor
from torch.nn import functional

from agents.algorithms.options import LAST_STEPS, with_fixed
from agents.algorithms.whole_episodes import WholeEpisodesAlgorithm
from agents.distributed import Metric
from agents.policy.abilities import SamplerAbilities
from agents.policy.weight_copies import WeightSnapshot
from agents.rollout.buffer import TensorRolloutBuffer, Transitions
from agents.rollout.vec_env import denoising_env_of
from ddpo_env.models import abilities_of
from ddpo_env.validation.options import check_value
from rewards import DifferentiableReward, check_differentiable, score_with_gradient
from rewards.differentiable import require_finite_gradient


@dataclass(frozen=True)
class LastSteps(Transitions):
    """The last K steps of some trajectories, the first of those steps of every trajectory first: `(K · batch, ...)`.

    Attributes:
        prompts: of the trajectories, `batch` texts.
    """

    prompts: list[str]


class DRaFT(WholeEpisodesAlgorithm):
    """Training by the gradient of a differentiable reward.

    There are no advantages, and `timestep_window` and `timestep_fraction` have no effect. The sampler may be any, with
    noise or without. `kl_coef` is the weight of the squared distance of the denoiser's outputs from the pretrained
    one's, mean over the last steps.

    Args:
        policy: `DiffusionPolicy`, or another policy of a sampler's steps.
        env: a denoising environment whose reward can be differentiated (`rewards.DifferentiableReward`). What wrappers
            do to its rewards has no effect.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout, a multiple of the episode's length; default: one episode.
        batch_size: samples in one update; default: all of the rollout. `micro_batch_size` counts samples too, and their
            last steps, decoder and reward are all in memory at once.
        n_epochs: passes over the rollout.
        last_steps: K.
        **arguments: of `TensorOnPolicyAlgorithm`: `micro_batch_size`, `kl_coef`, `ema_decay`, ...; and of
            `RolloutAlgorithm`: `policy_kwargs`, `seed`, `device`, ...

    Raises:
        ValueError: for an argument that is not valid, or a policy, a model or a reward without what this needs.
    """

    compares_with_sampling = needs_log_probs = penalises_steps = False
    denoising_policy: SamplerAbilities

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int | None = None,
        batch_size: int | None = None,
        n_epochs: int = 1,
        last_steps: int = 1,
        **arguments: Any,
    ) -> None:
        check_value("last_steps", last_steps, Annotated[int, LAST_STEPS])
        arguments = with_fixed(arguments, type(self).__name__, "which has none", advantage=None)
        self.last_steps = last_steps
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            **arguments | {"advantage": _no_advantage},
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        if not isinstance(self.abilities, SamplerAbilities):
            raise ValueError(
                "policy must be one of a sampler's steps such as DiffusionPolicy with DRaFT, which differentiates them "
                f"(SamplerAbilities); got a {type(self.policy).__name__}"
            )
        self.denoising_policy = self.abilities
        self._sampled = WeightSnapshot()
        self._check_options(self.abilities)
        if self.env is not None:  # an algorithm that is loaded without one can only predict
            _ = self.reward
            self._check_decoder(self.abilities)

    def _check_options(self, policy: SamplerAbilities) -> None:
        steps = policy.num_inference_steps
        for name, value, is_valid, valid in (
            ("ent_coef", self.ent_coef, self.ent_coef == 0, "0, because its loss has no entropy"),
            ("critic", policy.critic, policy.critic is None, "None, because it has no use for values"),
            (
                "noise_window",
                self.options.noise_window,
                self.options.noise_window is None,
                "None: it trains other steps",
            ),
            ("context_key", self.context_key, self.context_key == "prompt", "'prompt', which its reward is given"),
            ("last_steps", self.last_steps, self.last_steps <= steps, f"at most {steps}, the length of an episode"),
        ):
            if not is_valid:
                raise ValueError(f"{name} must be {valid}, with DRaFT; got {value!r}")
        self.check_episodes()

    def _check_decoder(self, policy: SamplerAbilities) -> None:
        model = policy.model
        latents = torch.zeros(1, *model.latent_shape, device=self.device, requires_grad=True)
        with torch.enable_grad():
            samples = abilities_of(model).decode_with_gradient(latents)
        if not samples.requires_grad:
            raise ValueError(
                f"model {model.source!r} must have a decoder with a gradient for DRaFT; its decode_with_gradient "
                "returned samples without one"
            )

    @property
    def reward(self) -> DifferentiableReward:
        """The environment's reward.

        Raises:
            ValueError: if there is none that can be differentiated.
        """
        env = None if self.env is None else denoising_env_of(self.env)
        if env is None:
            raise ValueError(
                "env must be a denoising environment such as DDPO-SD-v0 with DRaFT, which differentiates its decoder "
                f"and its reward; got {self.env!r}"
            )
        return check_differentiable(env.reward)

    def train(self) -> None:
        """Update the policy on the rollout; later updates need the weights that sampled it, to know the noise."""
        has_later_updates = self.n_epochs > 1 or self.batch_size is not None
        self._sampled = WeightSnapshot(self._learning_parameters() if has_later_updates else [], self._n_updates)
        super().train()

    def select_steps(self) -> npt.NDArray[np.int64]:
        """Return the flat indices of the last step of every trajectory: one for each sample."""
        return self.rollout_buffer.final_steps()

    def transitions(self, indices: npt.NDArray[np.int64]) -> LastSteps:
        """Return the last steps of the trajectories that end at flat indices."""
        rollout = self.rollout_buffer
        steps = np.stack([indices - rollout.n_envs * back for back in reversed(range(self.last_steps))])
        prompts = [str(rollout.contexts[segment]) for segment in rollout.segments.ravel()[indices]]
        return LastSteps(**vars(rollout[steps.ravel()]), prompts=prompts)

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return minus the mean reward, with the KL term; and metrics."""
        assert isinstance(batch, LastSteps)
        latents, penalty = self._denoise_again(batch)
        samples = abilities_of(self.denoising_policy.model).decode_with_gradient(latents)
        if not self.scaler.is_enabled():  # it looks for an overflow itself, and lowers its scale
            require_finite_gradient(self.reward, samples)
        scores = score_with_gradient(self.reward, samples, batch.prompts)
        loss = -scores.mean() + penalty
        logged: dict[str, Metric] = {"loss": loss.detach(), "reward": scores.detach().mean()}
        scored = batch.returns[-len(batch.prompts) :]
        logged["reward_difference"] = (scores.detach() - scored).abs().mean()
        if self.options.kl_coef:
            logged["kl_penalty"] = penalty.detach()
        return loss, logged

    def _denoise_again(self, batch: LastSteps) -> tuple[Tensor, Tensor]:
        """Take the last steps again; return the final latents `(batch, *latent_shape)` and the KL penalty, a scalar.

        The noise of a step is what the rollout's latent differs by from the mean of the policy that sampled it.
        """
        rows = len(batch.prompts)
        noise = None if self._sampled.is_current(self._n_updates) else self._noise(batch)
        latents, _, _ = _state(batch, slice(rows))
        distance = torch.zeros((), device=latents.device)
        for start in range(0, len(batch.actions), rows):
            step = slice(start, start + rows)
            _, timestep, conditioning = _state(batch, step)
            mean, output = self._mean(latents, timestep, conditioning)
            if self.options.kl_coef:
                distance = distance + functional.mse_loss(output, self._pretrained(latents, timestep, conditioning))
            latents = mean + (batch.actions[step] - mean.detach() if noise is None else noise[step])
        return latents, self.options.kl_coef * distance / self.last_steps

    def _mean(self, latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean of the next latents, and the denoiser's output: both `(batch, *latent_shape)`."""
        policy = self.denoising_policy
        output = policy.predict_output(latents, timestep, conditioning)
        sampler = policy.sampler_on(latents.device)
        return sampler.mean(latents, output, sampler.step_index_of(timestep)), output

    def _pretrained(self, latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Return the pretrained denoiser's output, `(batch, *latent_shape)`, with a gradient if the latents have one.

        The latents after the first of the last steps depend on the weights that learn, and so does this output.
        """
        policy = self.denoising_policy
        with torch.set_grad_enabled(latents.requires_grad):
            return policy.predict_output(latents, timestep, conditioning, policy.model.denoiser)

    @torch.no_grad()
    def _noise(self, batch: LastSteps) -> Tensor:
        """Return σ ε of the rollout, with the weights that sampled it, `(K · batch, *latent_shape)`."""
        with self._sampled.in_use():
            mean, _ = self._mean(*_state(batch, slice(None)))
        return batch.actions - mean


def _no_advantage(rollout: TensorRolloutBuffer) -> Tensor:
    """Return zeros, `(buffer_size, n_envs)`: the loss does not read advantages."""
    return torch.zeros_like(rollout.advantages)


def _state(batch: LastSteps, rows: slice) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the latents, timesteps and conditioning of some rows, as the rollout has them."""
    assert isinstance(batch.observations, dict)
    observation = {name: values[rows] for name, values in batch.observations.items()}
    return observation.pop("latents"), observation.pop("timestep").flatten(), observation
