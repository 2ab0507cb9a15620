"""Online DPO: direct preference optimisation of a diffusion model on pairs of its own samples (Wallace et al. 2023).

    e_θ(x_0)  = mean (out_θ(x_t, t, c) − target)²                       the denoising loss of pretraining
    Δ(x_0)    = e_θ(x_0) − e_pretrained(x_0)                            at the same noise and timestep
    L         = −E[ log sigmoid( −β/2 · (Δ(winner) − Δ(loser)) ) ]

The equation is that of Diffusion-DPO (arXiv 2311.12908, eq. 14, with the timestep's weight and T in β). There the pairs
come from a data set. Here they come from the iteration: the best sample of a prompt against its worst one, as in
Flow-Factory's code. Both samples of a pair are noised with the same noise to the same timestep.

The unit of an update is a pair at a timestep. Its index is that of the winner's step in the rollout, and `transitions`
adds the loser. So no cut of the indices into updates, micro-batches and processes can part a pair.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor
from torch.nn import functional

from agents.algorithms.advantages import prompt_groups
from agents.algorithms.forward.forward_process import ForwardProcessAlgorithm
from agents.algorithms.options import DPO_BETA
from agents.distributed import Metric
from agents.rollout.buffer import TensorRolloutBuffer, Transitions
from ddpo_env.sampler.denoising_loss import NoisedSamples
from ddpo_env.validation.options import check_value


class DPO(ForwardProcessAlgorithm):
    """Online DPO: the best sample of each prompt against its worst one, by the estimator's advantages.

    A prompt whose samples all have the same advantage gives no pair. An iteration without any pair has no update;
    `train/pairs` says how many there are. Samples that are neither best nor worst are not trained on.

    Args:
        policy: `DiffusionPolicy`, or another policy with a denoiser and a pretrained one.
        env: environment, vectorized environment or id, with at least two samples for a prompt.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout, a multiple of the episode's length; default: one episode.
        batch_size: rows in one update, two for a pair at a timestep; default: all of the rollout.
        n_epochs: passes over the pairs.
        beta: β. With a larger beta, a pair that the policy already ranks correctly loses its gradient sooner.
        **arguments: of `TensorOnPolicyAlgorithm`: `micro_batch_size` (rows in one call of the policy, at least a
            pair), `kl_coef`, `timestep_fraction`, ...; and of `RolloutAlgorithm`: `advantage`, which ranks the samples
            of a prompt, `policy_kwargs`, `seed`, `device`, ...

    Raises:
        ValueError: for an argument that is not valid, or a policy without a denoiser or a pretrained one; for a prompt
            with a single sample, in the first iteration if that could not be told before.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int | None = None,
        batch_size: int | None = None,
        n_epochs: int = 1,
        beta: float = 2000.0,
        **arguments: Any,
    ) -> None:
        check_value("beta", beta, Annotated[float, DPO_BETA])
        self.beta = beta
        self._loser_of: dict[int, int] = {}
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
        if not self.abilities.knows_reference:
            raise ValueError(
                f"policy must know a pretrained one with DPO, whose loss compares with it "
                f"(PolicyAbilities.knows_reference); got a {type(self.policy).__name__}"
            )
        self.check_prompts("DPO")

    def train(self) -> None:
        """Update the policy on the pairs of the rollout."""
        super().train()
        self.logger.record("train/pairs", len(self._loser_of))

    def step_weights(self, rollout: TensorRolloutBuffer) -> Tensor:
        """Return the advantages, and form the pairs of the rollout by them."""
        advantages = super().step_weights(rollout)
        self._loser_of = self.pairs(rollout, advantages)
        return advantages

    def pairs(self, rollout: TensorRolloutBuffer, advantages: Tensor) -> dict[int, int]:
        """Return a dictionary from the last step of each pair's winner to that of its loser, as flat indices.

        Among samples with the same advantage, the first one counts.
        """
        last = self.last_steps()
        ranks = advantages.flatten().cpu().numpy()[last]
        pairs = {}
        for members in prompt_groups(rollout, "DPO"):
            best, worst = members[int(ranks[members].argmax())], members[int(ranks[members].argmin())]
            if ranks[best] > ranks[worst]:
                pairs[int(last[best])] = int(last[worst])
        return pairs

    def select_steps(self) -> npt.NDArray[np.int64]:
        """Return the steps of the winners whose timesteps an epoch trains on."""
        steps = super().select_steps()
        return steps[np.isin(self.finished_by(steps), list(self._loser_of))]

    def transitions(self, indices: npt.NDArray[np.int64]) -> Transitions:
        """Return the finished winners for steps at flat indices, and then their losers: twice as many rows."""
        rollout = self.rollout_buffer
        winners = self.finished_by(indices)
        losers = np.array([self._loser_of[int(winner)] for winner in winners], np.int64)
        steps_before_the_end = (winners - indices) // rollout.n_envs
        both = np.concatenate([indices, losers - steps_before_the_end * rollout.n_envs])
        return replace(rollout[both], actions=self.samples(np.concatenate([winners, losers])))

    def noised(self, batch: Transitions) -> NoisedSamples:
        """Return winners and losers with new noise, the same for both of a pair."""
        noise = self.new_noise(len(batch.actions) // 2)
        return self.abilities.noised(batch, torch.cat([noise, noise]))

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return the preference loss of winners and losers, and the other terms; and metrics."""
        noised = self.noised(batch)
        with torch.no_grad():
            pretrained = self.abilities.noised_output(noised, pretrained=True)
        output = self.abilities.noised_output(noised)
        change = noised.denoising_loss(output) - noised.denoising_loss(pretrained)
        winners, losers = change.chunk(2)
        margin = -self.beta / 2 * (winners - losers)
        loss, logged = self.penalised(-functional.logsigmoid(margin).mean(), output, noised, batch, pretrained)
        logged["preference_accuracy"] = (margin.detach() > 0).float().mean()
        logged["winner_change"], logged["loser_change"] = winners.detach().mean(), losers.detach().mean()
        return loss, logged

    def _batches(self, indices: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Cut an epoch's pairs into updates of about the same size: the number of pairs differs by iteration."""
        updates = math.ceil(len(indices) / _pairs(self.batch_size, len(indices)))
        return np.array_split(indices, updates) if updates else []

    def _micro_batches(self, indices: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        size = _pairs(self.micro_batch_size, len(indices))
        return [indices[start : start + size] for start in range(0, len(indices), size)]


def _pairs(rows: int | None, most: int) -> int:
    """Return how many pairs make so many rows, at least one; `None`: `most`."""
    return max(1, most if rows is None else rows // 2)
