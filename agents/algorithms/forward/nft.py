"""DiffusionNFT: negative-aware fine-tuning on the forward process (Zheng et al. 2025, arXiv 2509.16117, section 3).

    r      = ½ + ½ clip(A / A_max, −1, 1)                       how likely the sample is a good one
    x̂_±    = (1 ∓ β) x̂_old ± β x̂_θ                              an implicit better policy, and a worse one
    L      = A_max / β · E[ r ‖x̂_+ − x_0‖² / w_+ + (1 − r) ‖x̂_− − x_0‖² / w_− ] + kl_coef · ‖out_θ − out_pretrained‖²
    w_±    = mean |x̂_± − x_0|, without gradient, at least 1e-5
    θ_old  ← d θ_old + (1 − d) θ,    d = min(0.001 n, 0.5)       after each iteration; n updates so far

`x̂` is the clean latent that the denoiser predicts from a noised sample. It is affine in the output, so mixing the
predictions is mixing the outputs, as the paper does with velocities, whatever the denoiser predicts. The old policy
samples. All norms are means over the latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor

from agents.algorithms.forward.forward_process import LaggingAlgorithm
from agents.algorithms.options import BETA
from agents.distributed import Metric
from agents.rollout.buffer import Transitions
from ddpo_env.validation.options import POSITIVE, check_value

_SMALLEST_WEIGHT = 1e-5


class NFT(LaggingAlgorithm):
    """DiffusionNFT with interchangeable advantages, on rollouts of an older policy that follows the one that learns.

    Args:
        policy: `DiffusionPolicy`, or another policy with a denoiser. The paper has no guidance (`guidance_scale=1`).
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout, a multiple of the episode's length; default: one episode.
        batch_size: pairs of a sample and a timestep in one update; default: all of the rollout, as in the paper.
        n_epochs: passes over the rollout.
        beta: β, how far the implicit policies are from the old one: 1 in the paper, 0.1 for its text rendering.
        advantage_clip: A_max, the advantage from which a sample is good for sure.
        lag_rate: growth of the old policy's decay d with each update.
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
        beta: float = 1.0,
        advantage_clip: float = 5.0,
        lag_rate: float = 0.001,
        lag_limit: float = 0.5,
        **arguments: Any,
    ) -> None:
        check_value("beta", beta, Annotated[float, BETA])
        check_value("advantage_clip", advantage_clip, Annotated[float, POSITIVE])
        self.beta, self.advantage_clip = beta, advantage_clip
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

    @contextmanager
    def sampling(self, rollout: int) -> Iterator[None]:
        """Sample with the old policy inside this context."""
        with self.as_lagging(), super().sampling(rollout):
            yield

    def _recompute_log_probs(self, indices: npt.NDArray[np.int64]) -> None:
        with self.as_lagging():  # which sampled
            super()._recompute_log_probs(indices)

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return the matching losses of the better and the worse policy, and the other terms; and metrics."""
        noised = self.noised(batch)
        old = noised.predict_clean(self.lagging_output(noised))
        output = self.abilities.noised_output(noised)
        new = noised.predict_clean(output)
        goodness = 0.5 + 0.5 * (batch.advantages / self.advantage_clip).clamp(-1, 1)
        positive = _normalised_error((1 - self.beta) * old + self.beta * new, noised.clean)
        negative = _normalised_error((1 + self.beta) * old - self.beta * new, noised.clean)
        weighted = goodness * positive + (1 - goodness) * negative
        loss, logged = self.penalised(self.advantage_clip / self.beta * weighted.mean(), output, noised, batch)
        logged["lag_distance"] = (new - old).detach().square().mean()
        return loss, logged


def _normalised_error(predicted: Tensor, clean: Tensor) -> Tensor:
    """Return the mean squared error over the mean absolute one, which has no gradient, `(batch,)`."""
    error = (predicted - clean).flatten(1)
    weight = error.detach().abs().mean(1).clamp(min=_SMALLEST_WEIGHT)
    return error.square().mean(1) / weight
