"""Group relative policy optimisation: PPO whose baseline is the mean of the prompt's samples (Shao et al. 2024).

    A_i = (r_i − mean(r_1 … r_G)) / std(r_1 … r_G)              for the G samples of a prompt in an iteration
    L   = −E[ min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) ] + kl_coef · KL(π_θ ‖ π_pretrained)

ρ is the importance ratio of one denoising step, and every step of a trajectory has the advantage of its sample
(arXiv 2402.03300, section 4.1; for flows Flow-GRPO, arXiv 2505.05470, and DanceGRPO, arXiv 2505.07818). The divergence
is in closed form. There is no critic, and unlike `PerPromptAdvantage` no memory of earlier iterations.
"""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from agents.algorithms.advantages import AdvantageEstimator, GroupRelativeAdvantage
from agents.algorithms.policy_gradient.ppo import PPO


class GRPO(PPO):
    """PPO with group relative advantages. The environment must give a prompt to at least two samples.

    Args:
        policy: policy class, or `"MlpPolicy"`, `"CnnPolicy"`, `"MultiInputPolicy"`.
        env: environment, vectorized environment or id.
        learning_rate: a number, or a function of the remaining progress.
        n_steps: steps of each sub-environment in a rollout, a multiple of the episode's length; default: one episode of
            a denoising environment, 2,048 steps of another.
        batch_size: transitions in one update.
        n_epochs: passes over the rollout.
        clip_range: ε, or a function of the remaining progress; see `PPO`.
        advantage: estimator; default: `GroupRelativeAdvantage`. With another `scale` it is Dr. GRPO's, or that of
            Flow-GRPO's `global_std`; `DecoupledAdvantage` is GDPO's.
        **arguments: of `PPO`.

    Raises:
        ValueError: for an argument that is not valid; for a prompt with a single sample, in the first iteration if that
            could not be told before.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int | None = None,
        batch_size: int = 64,
        n_epochs: int = 1,
        clip_range: float | Schedule = 0.2,
        advantage: AdvantageEstimator | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            clip_range=clip_range,
            advantage=GroupRelativeAdvantage() if advantage is None else advantage,
            **arguments,
        )
