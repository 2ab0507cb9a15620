"""Episodes whose reward arrives after their last step: the environment went on sampling while it was being computed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.rollout.buffer import TensorRolloutBuffer

_NOTED = ("episode", "is_success")
"""What of an episode's last info goes into the means that Stable-Baselines3 logs."""


@dataclass
class EndedEpisode:
    """An episode whose reward is in the rollout.

    Attributes:
        step: its last, in the rollout.
        slot: its environment.
        noted: what Stable-Baselines3 notes of it.
        details: what the reward reported beside its score, by name.
    """

    step: int
    slot: int
    noted: dict[str, Any]
    details: dict[str, Any]

    def add(self, score: float, rollout: TensorRolloutBuffer) -> None:
        """Add to the reward of the last step, and to what is noted as the sum of all."""
        rollout.rewards[self.step, self.slot] += score
        if "episode" in self.noted:
            self.noted["episode"]["r"] += score

    def is_finite(self, rollout: TensorRolloutBuffer) -> bool:
        """Whether there is a score: neither the last step's reward nor the sum of all is NaN or infinite."""
        total = self.noted.get("episode", {}).get("r", 0.0)
        return bool(np.isfinite([rollout.rewards[self.step, self.slot], total]).all())


class PendingRewards:
    """The episodes of one rollout that have ended, until their reward is known.

    That is at once, unless the environment has `deferred_rewards=True`.

    Attributes:
        ended: the episodes whose reward is known, in their order.

    Args:
        rollout: whose `rewards` are to be completed.
    """

    def __init__(self, rollout: TensorRolloutBuffer) -> None:
        """Begin with nothing pending."""
        self.rollout = rollout
        self.ended: list[EndedEpisode] = []
        self._pending: deque[tuple[int, int, dict[str, Any]]] = deque()

    def add(self, step: int, dones: npt.NDArray[np.bool_], infos: list[dict[str, Any]]) -> None:
        """Take note of the episodes that end with this step, which the rollout holds already."""
        self._pending.extend((step, int(slot), infos[slot]) for slot in np.flatnonzero(dones))

    def collect(self, wait: bool = False) -> None:
        """Put the rewards that are there where they belong, in the order of their episodes.

        Args:
            wait: for those that are not there yet.

        Raises:
            Exception: whatever the reward raised.
        """
        while self._pending and (wait or _is_known(self._pending[0][2])):
            step, slot, info = self._pending.popleft()
            noted = {name: info[name] for name in _NOTED if name in info}
            episode = EndedEpisode(step, slot, noted, dict(info.get("reward_details", {})))
            if "deferred_reward" in info:
                deferred = info.pop("deferred_reward")
                episode.add(deferred.result(), self.rollout)
                episode.details = deferred.details()
            self.ended.append(episode)


def _is_known(info: dict[str, Any]) -> bool:
    return "deferred_reward" not in info or info["deferred_reward"].done()
