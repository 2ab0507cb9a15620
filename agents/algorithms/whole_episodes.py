"""An algorithm that trains on finished samples, so that its rollouts must be whole episodes: one, or several."""

from __future__ import annotations

from typing import Any

from agents.algorithms.on_policy import TensorOnPolicyAlgorithm
from agents.algorithms.options import check_whole_episodes
from ddpo_env.spaces import DenoisingObservationSpace


class WholeEpisodesAlgorithm(TensorOnPolicyAlgorithm):
    """Base of the algorithms whose rollouts are whole episodes.

    Args:
        *arguments: of `TensorOnPolicyAlgorithm`.
        n_steps: steps of each sub-environment in a rollout, a multiple of the episode's length; `None`: one episode.
        **named: of `TensorOnPolicyAlgorithm`.
    """

    def __init__(self, *arguments: Any, n_steps: int | None, **named: Any) -> None:
        self._is_one_episode = n_steps is None
        super().__init__(*arguments, n_steps=1 if n_steps is None else n_steps, **named)

    def _setup_model(self) -> None:
        if self._is_one_episode:  # the buffer is made before the policy, which knows it too
            self.n_steps = self._episode_length() or self.n_steps
        super()._setup_model()

    def check_episodes(self) -> None:
        """Refuse an `n_steps` that cuts episodes, where their length is known.

        Raises:
            ValueError: also for an open `n_steps` where it is not known.
        """
        name = type(self).__name__
        if self._is_one_episode and self._episode_length() is None:
            raise ValueError(
                f"n_steps must be given with {name} and an environment that does not say how long its episodes are "
                "(DenoisingObservationSpace); got None"
            )
        check_whole_episodes(self.n_steps, self.abilities.stochastic_steps(), name)

    def _episode_length(self) -> int | None:
        space, given = self.observation_space, self.policy_kwargs.get("num_inference_steps")
        return given or (space.handle.num_inference_steps if isinstance(space, DenoisingObservationSpace) else None)
