"""Rewards that arrive after their step: the environment went on sampling while they were being computed."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.rollout_buffer import TensorRolloutBuffer


class PendingRewards:
    """The rewards of one rollout that an environment with `deferred_rewards=True` still owes.

    Attributes:
        details: what the reward reported beside its scores, by name, one value an episode; of rewards that were not
            deferred too.

    Args:
        rollout: whose `rewards` are to be completed.
    """

    def __init__(self, rollout: TensorRolloutBuffer) -> None:
        """Begin with nothing pending."""
        self.rollout = rollout
        self.details: dict[str, list[Any]] = defaultdict(list)
        self._pending: deque[tuple[int, int, dict[str, Any]]] = deque()

    def add(self, step: int, dones: npt.NDArray[np.bool_], infos: list[dict[str, Any]]) -> None:
        """Take note of the episodes that end with this step."""
        for slot in np.flatnonzero(dones):
            if "deferred_reward" in infos[slot]:
                self._pending.append((step, int(slot), infos[slot]))
            else:
                self._note(infos[slot].get("reward_details", {}))

    def collect(self, wait: bool = False) -> None:
        """Put the rewards that are there where they belong, in the order of their episodes.

        Args:
            wait: for those that are not there yet.

        Raises:
            Exception: whatever the reward raised.
        """
        while self._pending and (wait or self._pending[0][2]["deferred_reward"].done()):
            step, slot, info = self._pending.popleft()
            deferred = info.pop("deferred_reward")
            score = deferred.result()
            self.rollout.rewards[step, slot] += score
            if "episode" in info:
                info["episode"]["r"] += score
            self._note(deferred.details())

    def _note(self, details: dict[str, Any]) -> None:
        for name, value in details.items():
            self.details[name].append(value)
