"""Episodes whose reward arrives after their last step: the environment went on sampling while it was being computed."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.rollout_buffer import TensorRolloutBuffer

_NOTED = ("episode", "is_success")
"""What of an episode's last info goes into the means that Stable-Baselines3 logs."""


class PendingRewards:
    """The episodes of one rollout that have ended, until their reward is known.

    That is at once, unless the environment has `deferred_rewards=True`.

    Attributes:
        episodes: what Stable-Baselines3 notes of the episodes whose reward is known, and finite, in their order.
        details: what the reward reported beside its scores, by name, one value an episode whose reward is finite.

    Args:
        rollout: whose `rewards` are to be completed.
    """

    def __init__(self, rollout: TensorRolloutBuffer) -> None:
        """Begin with nothing pending."""
        self.rollout = rollout
        self.episodes: list[dict[str, Any]] = []
        self.details: dict[str, list[Any]] = defaultdict(list)
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
            details = info.get("reward_details", {})
            if "deferred_reward" in info:
                deferred = info.pop("deferred_reward")
                score = deferred.result()
                self.rollout.rewards[step, slot] += score
                if "episode" in info:
                    info["episode"]["r"] += score
                details = deferred.details()
            if not np.isfinite([self.rollout.rewards[step, slot], info.get("episode", {}).get("r", 0.0)]).all():
                continue
            for name, value in details.items():
                self.details[name].append(value)
            self.episodes.append({name: info[name] for name in _NOTED if name in info})


def _is_known(info: dict[str, Any]) -> bool:
    return "deferred_reward" not in info or info["deferred_reward"].done()
