"""REINFORCE, which on the denoising MDP is DDPO-SF, the score-function estimator (Black et al. 2023, section 4.3).

    ∇J = E[ Σ_t  ∇ log p_θ(x_{t-1}|x_t,c) · A(x_0,c) ]          (DDPO-SF)

The expectation is under the current policy, so one rollout is used for one gradient step.
"""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor

from agents.algorithms.options import with_fixed
from agents.algorithms.whole_episodes import WholeEpisodesAlgorithm
from agents.distributed import Metric
from agents.rollout.buffer import Transitions


class REINFORCE(WholeEpisodesAlgorithm):
    """REINFORCE (Williams 1992) with interchangeable advantages: one gradient step on each rollout.

    Without an estimator, a policy with a critic makes it advantage actor-critic: `GeneralizedAdvantage`.

    Args:
        policy: policy class, or `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`.
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout; default: one episode of a denoising environment, 32 of
            another.
        **arguments: of `TensorOnPolicyAlgorithm`: `micro_batch_size`, `kl_coef`, `timestep_fraction`, `ema_decay`, ...;
            and of `RolloutAlgorithm`: `gamma`, `gae_lambda`, `advantage`, `policy_kwargs`, `seed`, `device`, ...

    Raises:
        ValueError: for an argument that is not valid.
    """

    compares_with_sampling = False
    generic_steps = 32

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 7e-4,
        n_steps: int | None = None,
        **arguments: Any,
    ) -> None:
        reason = "which takes one gradient step on each rollout"
        arguments = with_fixed(arguments, type(self).__name__, reason, batch_size=None, n_epochs=1)
        super().__init__(policy, env, learning_rate=learning_rate, n_steps=n_steps, **arguments)

    def loss(self, batch: Transitions) -> tuple[Tensor, dict[str, Metric]]:
        """Return the negative log-likelihood weighted by advantages, with critic, entropy and KL terms; and metrics."""
        policy = self.evaluate(batch)
        return self.regularized(-(batch.advantages * policy.log_prob).mean(), policy, batch)
