"""A reward that several processes share: each measures its own pictures, and all form the scores of the whole batch.

No process waits for another while a reward is asked. The measurements travel with the episodes, among the details;
whoever has gathered them asks `SharedReward.combined`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.protocol import (
    Details,
    Metadata,
    NonFinite,
    Reward,
    Samples,
    StatefulReward,
    TwoStageReward,
    check_answer,
    is_images_only,
    reward_name,
    split_answer,
    treat_non_finite,
)

MEASUREMENT = "measurement to be combined"
"""The detail in which a `SharedReward` passes on what it has measured, a `Measurement` a picture."""


@dataclass(frozen=True)
class Measurement:
    """One picture's, of any kind: an object that no container takes apart.

    Attributes:
        value: what `TwoStageReward.measure` returned of it.
    """

    value: Any


class SharedReward:
    """A two-stage reward as one of several processes asks it.

    Called, it measures: every score is 0, and the measurements are among the details. `combined` gives the scores.

    Args:
        whole: the reward.
    """

    def __init__(self, whole: TwoStageReward) -> None:
        """Take the reward, which stays as it is."""
        self.whole = whole
        self.__name__ = reward_name(whole)

    @property
    def images_only(self) -> bool:
        """Whether the reward is of pictures alone."""
        return is_images_only(self.whole)

    def __call__(
        self, images: Samples, prompts: Sequence[str], metadata: Metadata
    ) -> tuple[NDArray[np.float64], Details]:
        """Measure a batch.

        Returns:
            Zeros, (batch,), and the reward's details with `MEASUREMENT` among them.

        Raises:
            ValueError: There is not one measurement a picture.
        """
        measurements, details = split_answer(self.whole.measure(images, prompts, metadata))
        if len(measurements) != len(images):
            raise ValueError(
                f"reward {self.__name__}: measure must return {len(images)} measurements, one a picture; "
                f"got {len(measurements)}"
            )
        return np.zeros(len(images)), {**details, MEASUREMENT: [Measurement(one) for one in measurements]}

    def combined(
        self, details: Mapping[str, Sequence[Any]], prompts: Sequence[str], non_finite: NonFinite
    ) -> tuple[NDArray[np.float64], dict[str, list[Any]]]:
        """Score a batch that was measured, in all processes alike.

        Args:
            details: of all pictures of the batch, in their order, `MEASUREMENT` among them.
            prompts: one a picture.
            non_finite: as for `evaluate_reward`.

        Returns:
            What `evaluate_reward` returns of the reward itself.

        Raises:
            Exception: Whatever `combine` raises, with a note that names the reward.
            TypeError: It returned something other than numbers.
            ValueError: Its answer has the wrong length or is not finite.
        """
        scores, added = combine(self.whole, [one.value for one in details[MEASUREMENT]])
        known = {name: list(values) for name, values in details.items() if name != MEASUREMENT}
        return scores, treat_non_finite(scores, known | added, self.__name__, prompts, non_finite)


def combine(reward: TwoStageReward, measurements: Sequence[Any]) -> tuple[NDArray[np.float64], dict[str, list[Any]]]:
    """Let a two-stage reward combine a batch's measurements, and check the answer as `check_answer` does."""
    name = reward_name(reward)
    try:
        answer = reward.combine(measurements)
    except Exception as error:
        error.add_note(f"raised by the reward {name}, combining {len(measurements)} measurements")
        raise
    return check_answer(answer, name, len(measurements))


def shared(reward: Reward) -> Reward:
    """Return what each of several processes asks in a reward's place: the same object if scores are a picture's own.

    Raises:
        ValueError: The reward, or a part of it, has a state, and no `measure` and `combine`.
    """
    if lonely := _with_a_state_alone(reward, reward_name(reward)):
        raise ValueError(
            f"reward {', '.join(lonely)} keeps a state (state_dict), and each of several processes would keep its own: "
            "it must have measure(images, prompts, metadata) and combine(measurements), see rewards.TwoStageReward; "
            "or start one process"
        )
    return SharedReward(reward) if isinstance(reward, TwoStageReward) else reward


def unshared(reward: Reward) -> Reward:
    """Return the reward that `shared` was given."""
    return reward.whole if isinstance(reward, SharedReward) else reward  # type: ignore[return-value]


def _with_a_state_alone(reward: object, name: str) -> list[str]:
    """Names of the rewards that cannot be shared: this one, or parts of it, which are its dictionary `rewards`."""
    if not isinstance(reward, TwoStageReward):
        return [name] if isinstance(reward, StatefulReward) else []
    parts = getattr(reward, "rewards", None)
    if not isinstance(parts, Mapping):
        return []
    return [one for key, part in parts.items() for one in _with_a_state_alone(part, str(key))]
