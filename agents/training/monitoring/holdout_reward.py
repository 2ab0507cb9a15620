"""The held-out reward: it scores the held-out samples of every evaluation, and nothing is trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from agents.config.train_config import TrainConfig
from ddpo_env.prompts import Prompt
from rewards import (
    Freezable,
    Reward,
    StatefulReward,
    asking_people,
    configured_reward,
    evaluate_reward,
    is_stateful,
    parse_options,
    reward_name,
)
from rewards.protocol import LARGEST_SCORE


def configured_holdout_reward(config: TrainConfig) -> Reward | None:
    """Return the held-out reward of a configuration, not loaded; `None` if there is none.

    Raises:
        ValueError, TypeError, ImportError: as for the reward itself, with a note that names the setting; or for a
            reward that asks people, or with a state that cannot be frozen.
    """
    settings = config.run
    if settings.holdout_reward is None:
        return None
    with naming_holdout_reward(settings.holdout_reward):
        options = parse_options(settings.holdout_reward_options, "holdout_reward_options")
        reward = configured_reward(settings.holdout_reward, options, "holdout_reward")
        if people := asking_people(reward):
            names = ", ".join(reward_name(one) for one in people)
            raise ValueError(f"reward {names} asks people, and held-out samples must not cost votes")
        if is_stateful(reward) and not isinstance(reward, Freezable):
            raise ValueError(
                f"reward {reward_name(reward)} has a state that changes from batch to batch and no method frozen(), so "
                "its scores before and after training cannot be compared"
            )
    return reward


@contextmanager
def naming_holdout_reward(spec: str | None) -> Iterator[None]:
    """Add a note to an error that says which of the two rewards it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"of holdout_reward={spec!r}")
        raise


class HoldoutReward:
    """Scores held-out samples, always on the same scale.

    The statistics of a weighted sum with standardised terms are those of the first samples, which the pretrained policy
    generated; afterwards they stay as they are. They are part of every checkpoint.

    Args:
        reward: what scores.
        spec: its setting, for errors.
        batch_size: samples that it is asked about at once.
        metadata: what it is told about every sample, beside the metadata of the prompt.
    """

    def __init__(self, reward: Reward, spec: str, batch_size: int, metadata: dict[str, Any]) -> None:
        """Take the reward; see the class docstring for the arguments."""
        self.reward = reward
        self.spec = spec
        self.batch_size = batch_size
        self.metadata = metadata
        self._stateful = cast(StatefulReward, reward) if is_stateful(reward) else None
        self._has_scale = False

    def __call__(self, samples: npt.NDArray[Any], prompts: Sequence[Prompt]) -> npt.NDArray[np.float64]:
        """Return one finite score for each sample, `(samples,)`.

        Args:
            samples: `(samples, ...)`.
            prompts: one per sample.

        Raises:
            ValueError: for a score that is NaN or infinite. No sample is left out, because samples of two evaluations
                are compared one by one.
            Exception: whatever the reward raises.
        """
        if not self._has_scale and self._stateful is not None:
            self._score(samples, prompts)
        self._has_scale = True
        with self.reward.frozen() if isinstance(self.reward, Freezable) else nullcontext():
            scores = self._score(samples, prompts)
        if (wrong := np.flatnonzero(~(np.abs(scores) <= LARGEST_SCORE))).size:
            first = int(wrong[0])
            raise ValueError(
                f"holdout_reward {self.spec!r} must be finite in float32; got {scores[first]} for prompt "
                f"{prompts[first][0]!r} (held-out sample {first} of {len(scores)}, {wrong.size} not finite)"
            )
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Return whether the scale is known, and the state of the reward."""
        state = {} if self._stateful is None else self._stateful.state_dict()
        return {"has_scale": self._has_scale, "reward": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self._stateful is not None:
            self._stateful.load_state_dict(state["reward"])
        self._has_scale = bool(state["has_scale"])

    def _score(self, samples: npt.NDArray[Any], prompts: Sequence[Prompt]) -> npt.NDArray[np.float64]:
        scores = []
        with naming_holdout_reward(self.spec):
            for start in range(0, len(samples), self.batch_size):
                part = slice(start, start + self.batch_size)
                texts = [text for text, _ in prompts[part]]
                metadata = [{**self.metadata, **own} for _, own in prompts[part]]
                scores.append(evaluate_reward(self.reward, samples[part], texts, metadata, non_finite="keep")[0])
        return np.concatenate(scores)
