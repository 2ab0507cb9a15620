"""An algorithm whose rollouts are whole episodes unless it is told otherwise: one, or several."""

from __future__ import annotations

from typing import Any, ClassVar

from agents.algorithms.advantages import COMPARING_SAMPLES
from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.algorithms.options import check_whole_episodes
from agents.rollout.vec_env import denoising_env_of
from ddpo_env.prompts import PromptSet
from ddpo_env.spaces import DenoisingObservationSpace


class WholeEpisodesAlgorithm(TensorOnPolicyAlgorithm):
    """Base of the algorithms whose rollouts are by default one episode, where its length is known.

    Args:
        *arguments: of `TensorOnPolicyAlgorithm`.
        n_steps: steps of each sub-environment in a rollout; `None`: one episode of a denoising environment, and
            `generic_steps` of another.
        **named: of `TensorOnPolicyAlgorithm`.
    """

    generic_steps: ClassVar[int | None] = None
    """`n_steps` by default where the length of an episode is not known; `None`: it must be given there."""

    def __init__(self, *arguments: Any, n_steps: int | None, **named: Any) -> None:
        self._is_open = n_steps is None
        super().__init__(*arguments, n_steps=1 if n_steps is None else n_steps, **named)

    def _setup_model(self) -> None:
        if self._is_open:  # the buffer is made before the policy, which knows it too
            self.n_steps = self._episode_length() or self.generic_steps or self.n_steps
        super()._setup_model()
        if isinstance(self.advantage, COMPARING_SAMPLES):
            self.check_prompts(type(self.advantage).__name__)

    def check_episodes(self) -> None:
        """Refuse an `n_steps` that cuts episodes, where their length is known.

        Raises:
            ValueError: also for an open `n_steps` where it is not known, and there is no default for that.
        """
        name = type(self).__name__
        if self._is_open and self.generic_steps is None and self._episode_length() is None:
            raise ValueError(
                f"n_steps must be given with {name} and an environment that does not say how long its episodes are "
                "(DenoisingObservationSpace); got None"
            )
        check_whole_episodes(self.n_steps, self.abilities.stochastic_steps(), name)

    def check_prompts(self, needing: str) -> None:
        """Refuse an environment in which it is almost certain that soon some prompt has a single sample in a rollout.

        That is where there are at least as many prompts as samples, and no two samples share one on purpose.

        Args:
            needing: name of what compares the samples of a prompt, for the error.

        Raises:
            ValueError: naming `samples_per_prompt`.
        """
        length = self._episode_length()
        if self.env is None or length is None or self.context_key != "prompt":
            return
        samples = self.n_steps * self.n_envs * self.processes.count // length
        env = denoising_env_of(self.env)
        prompts = 1 if env is None or env.samples_per_prompt > 1 else _count(env.prompts)
        if samples == 1 or prompts >= max(samples, 2):
            raise ValueError(
                f"samples_per_prompt must be at least 2 with {needing}, which compares samples of a prompt; got 1, and "
                f"a rollout of {samples} hardly shares prompts by chance"
            )

    def _episode_length(self) -> int | None:
        space, given = self.observation_space, self.policy_kwargs.get("num_inference_steps")
        return given or (space.handle.num_inference_steps if isinstance(space, DenoisingObservationSpace) else None)


def _count(prompts: Any) -> int:
    """Return how many prompts there are, as far as that is known."""
    return len(set(prompts.prompts)) if isinstance(prompts, PromptSet) else 1
