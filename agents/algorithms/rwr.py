"""Reward-weighted regression, the paper's baseline (Black et al. 2023, section 4.2; Peters & Schaal 2007).

    L = E[ w(x_0,c) · ‖ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t, c) − ε‖² ],    w ∝ exp(β A)             (RWR)
                                                                 or  w ∝ 1[A ≥ percentile]     (RWR-sparse)

The exponential weights are a softmax of all samples, or of the samples of each prompt, as the authors' configuration of
the aesthetic experiment has it (`per_prompt_weights` of https://github.com/jannerm/ddpo). A is the estimator's
advantage. In the paper and its code it is the reward as it is, `RawReturn`; the code has β = 1/5.

The policy imitates its own good samples. The policy decides what imitation means: a `DiffusionPolicy` minimises the
denoising loss of pretraining on final latents, which ignores that sampling is sequential. Any other policy maximises
the likelihood of its actions (`PolicyAbilities.regression_loss`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor
from torch.nn import functional

from agents.algorithms.advantages import prompt_groups
from agents.algorithms.options import PERCENTILE, with_fixed
from agents.algorithms.whole_episodes import WholeEpisodesAlgorithm
from agents.distributed import Metric, Rows
from agents.rollout.buffer import TensorRolloutBuffer, Transitions
from ddpo_env.tensors import widest_float
from ddpo_env.validation.options import Range, check_value

Weighting = Literal["exponential", "exponential_per_prompt", "percentile"]


class RWR(WholeEpisodesAlgorithm):
    """Reward-weighted regression on rollouts of the current policy.

    The weights are computed from the estimator's advantages and have mean 1 over the rollout's imitated steps.

    Args:
        policy: policy class, or `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`.
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout; default: one episode of a denoising environment, 256 of
            another. With a policy that denoises it must be a multiple of the episode's length.
        n_epochs: passes over the rollout; the paper uses 5, and 50 with the percentile.
        weighting: `"exponential"` (RWR), `"exponential_per_prompt"` (the weights have mean 1 within each prompt, which
            needs at least two episodes), or `"percentile"` (RWR-sparse).
        beta: β of the exponential weights, in 1 / (the advantage's unit).
        percentile: percentile of the advantages from which a step counts, in [0, 100).
        **arguments: of `TensorOnPolicyAlgorithm`: `batch_size` and `micro_batch_size` (in imitated steps; for a
            diffusion policy these are samples), `kl_coef`, ...; of `RolloutAlgorithm`: `gamma`, `advantage`, ...
            `timestep_fraction` and `timestep_window` have no effect on a policy that chooses its own steps.

    Raises:
        ValueError: for an argument that is not valid.
    """

    compares_with_sampling = needs_log_probs = False
    generic_steps = 256

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int | None = None,
        n_epochs: int = 5,
        weighting: Weighting = "exponential",
        beta: float = 1.0,
        percentile: float = 90.0,
        **arguments: Any,
    ) -> None:
        check_value("weighting", weighting, Weighting)
        check_value("beta", beta, Annotated[float, Range(above=0, at_most=1e6)])
        check_value("percentile", percentile, Annotated[float, PERCENTILE])
        self.weighting: Weighting = weighting
        self.beta = beta
        self.percentile = percentile
        arguments = with_fixed(arguments, type(self).__name__, "whose loss has no entropy", ent_coef=0.0)
        super().__init__(policy, env, learning_rate=learning_rate, n_steps=n_steps, n_epochs=n_epochs, **arguments)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.check_episodes()
        if self.weighting == "exponential_per_prompt":
            self.check_prompts("weighting='exponential_per_prompt'")

    def step_weights(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the weight of every imitated step, 0 for the others, `(buffer_size, n_envs)`."""
        advantages = super().step_weights(rollout).flatten()
        advantages = advantages.to(widest_float(advantages.device))
        steps = self.abilities.regression_steps(rollout)
        step_weights = torch.zeros_like(advantages)
        for group in self._by_prompt(rollout, steps) if self.weighting == "exponential_per_prompt" else [steps]:
            compared = torch.as_tensor(group, device=advantages.device)
            chosen = advantages[compared]
            if self.weighting == "percentile":
                weights = (chosen >= torch.quantile(chosen, self.percentile / 100)).to(advantages.dtype)
            else:
                weights = torch.exp(self.beta * (chosen - chosen.max()))
            step_weights[compared] = weights / weights.mean()
        return step_weights.float().view(rollout.rewards.shape).to(rollout.device)

    def _by_prompt(self, rollout: TensorRolloutBuffer, steps: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the steps of each prompt."""
        if None in rollout.contexts:
            raise ValueError(
                "weighting must be exponential or percentile where the environment's reset infos have no prompt; got "
                f"{self.weighting!r}"
            )
        segments = rollout.segments.ravel()[steps]
        for members in prompt_groups(rollout, f"weighting {self.weighting}"):
            yield steps[np.isin(segments, members)]

    def select_steps(self) -> npt.NDArray[np.int64]:
        """Return the imitated steps that have a weight."""
        steps = self.abilities.regression_steps(self.rollout_buffer)
        return steps[self.rollout_buffer.advantages.flatten().cpu().numpy()[steps] > 0]

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return the weighted imitation loss, with critic and KL terms; and metrics."""
        regression_loss = (batch.advantages * self.abilities.regression_loss(batch)).mean()
        loss = regression_loss
        logged: dict[str, Metric] = {
            "regression_loss": regression_loss.detach(),
            "largest_weight": batch.advantages.max(),
        }
        values = self.policy.predict_values(batch.observations).flatten()
        if values.requires_grad:
            value_loss = functional.mse_loss(values, batch.returns)
            loss = loss + self.vf_coef * value_loss
            logged["value_loss"] = value_loss.detach()
        kl_coef = self.options.kl_coef
        if kl_coef:  # on steps of whole trajectories, because the imitated ones may be the last steps only
            rows = self.abilities.rows or Rows.of_process(len(values), 0, 1)
            penalty = self.evaluate(self.rollout_buffer[rows.of(self.random_steps(rows.total))]).reference_kl
            assert penalty is not None
            loss = loss + kl_coef * penalty.mean()
            logged["kl_penalty"] = kl_coef * penalty.mean().detach()
        return loss, logged | {"loss": loss.detach()}

    def advance_rng(self, rows: int) -> None:
        """Draw what `loss` draws: the noise of the denoising loss, and the steps of the KL penalty."""
        self.abilities.advance_rng(rows)
        if self.options.kl_coef:
            self.random_steps(rows)
