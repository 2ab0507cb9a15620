"""Scores of ended episodes, on their way from the environment into the rollout buffer.

An ended episode has a score, or a pending one: its reward is still being computed, or several processes share the
batch and have only measured the sample (`rewards.TwoStageReward`). `collect` waits for the first kind; `join` is the
one place where the scores of several processes come together.
"""

from __future__ import annotations

import numbers
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.distributed import Processes
from agents.rollout.buffer import DROPPED, TensorRolloutBuffer
from rewards import NonFinite, Reward, TwoStageReward, combine_measurements

_STATISTICS = ("episode", "is_success")
"""Entries of an episode's last info that Stable-Baselines3 averages in its logs."""


@dataclass
class EndedEpisode:
    """An episode that ended in the rollout.

    Attributes:
        step: its last step in the rollout.
        index: its sub-environment.
        statistics: what Stable-Baselines3 logs about it.
        details: what the reward reported beside its score, by name.
        is_measured: whether the sample is only measured and its score still unknown.
        measurement: what the reward measured, then.
    """

    step: int
    index: int
    statistics: dict[str, Any]
    details: dict[str, Any]
    is_measured: bool = False
    measurement: Any = None

    def add_score(self, score: float, rollout: TensorRolloutBuffer) -> None:
        """Add a score to the reward of the last step and to the return in the statistics."""
        rollout.rewards[self.step, self.index] += score
        if "episode" in self.statistics:
            self.statistics["episode"]["r"] += score

    def is_finite(self, rollout: TensorRolloutBuffer) -> bool:
        """Return whether the last step's reward and the return are finite."""
        total = self.statistics.get("episode", {}).get("r", 0.0)
        return bool(np.isfinite([rollout.rewards[self.step, self.index], total]).all())


class PendingScores:
    """The ended episodes of one rollout, until all of their scores are in it.

    Args:
        rollout: the buffer whose `rewards` are completed.
    """

    def __init__(self, rollout: TensorRolloutBuffer) -> None:
        """Start with no ended episode."""
        self.rollout = rollout
        self._waiting: deque[tuple[int, int, dict[str, Any]]] = deque()
        self._ended: list[EndedEpisode] = []

    def add(self, step: int, dones: npt.NDArray[np.bool_], infos: list[dict[str, Any]]) -> None:
        """Note the episodes that end with this step, which is in the rollout already."""
        self._waiting.extend((step, int(index), infos[index]) for index in np.flatnonzero(dones))

    def collect(self, wait: bool = False) -> None:
        """Put the scores that are known into the rollout, in the order of the episodes' ends.

        Args:
            wait: wait for the scores that are not known yet.

        Raises:
            Exception: whatever the reward raised.
        """
        while self._waiting and (wait or _is_known(self._waiting[0][2])):
            step, index, info = self._waiting.popleft()
            statistics = {name: info[name] for name in _STATISTICS if name in info}
            episode = EndedEpisode(step, index, statistics, dict(info.get("reward_details", {})))
            if (deferred := info.pop("deferred_reward", None)) is not None:
                episode.details = deferred.details()
                episode.is_measured = deferred.is_measured
                if episode.is_measured:
                    episode.measurement = deferred.measurement()
                else:
                    episode.add_score(deferred.result(), self.rollout)
            self._ended.append(episode)

    def join(self, processes: Processes) -> list[EndedEpisode]:
        """Return the ended episodes of all processes, in the order in which one process would have seen them end.

        The rollout must hold the steps of all processes (`TensorRolloutBuffer.gather`).
        """
        if processes.count == 1:
            return self._ended
        episodes = []
        for process, ended in enumerate(processes.gather_objects(self._ended)):
            for episode in ended:
                episode.index += process * self.rollout.own_envs
                episodes.append(episode)
        return sorted(episodes, key=lambda episode: (episode.step, episode.index))


def score_measured(
    episodes: Sequence[EndedEpisode], rollout: TensorRolloutBuffer, reward: Reward | None, non_finite: NonFinite
) -> None:
    """Give the measured episodes of all processes their scores, in the rollout and in their statistics.

    The scores are formed as a single process would have: step by step, over the episodes that ended with it.

    Args:
        episodes: all ended episodes, as `PendingScores.join` returns them.
        rollout: with the steps of all processes.
        reward: which measured the samples.
        non_finite: how scores that are NaN or infinite are handled, see `rewards.evaluate_reward`.

    Raises:
        Exception: whatever the reward raises, in every process alike.
        ValueError: for a score that is not finite, unless such scores are kept.
    """
    measured = [episode for episode in episodes if episode.is_measured]
    for _, group in groupby(measured, key=lambda episode: episode.step):
        batch = list(group)
        assert isinstance(reward, TwoStageReward)
        prompts = [str(rollout.contexts[rollout.segments[episode.step, episode.index]]) for episode in batch]
        shared = {name: values for name, values in details_by_name(batch).items() if len(values) == len(batch)}
        measurements = [episode.measurement for episode in batch]
        scores, details = combine_measurements(reward, measurements, shared, prompts, non_finite)
        for row, (episode, score) in enumerate(zip(batch, scores.tolist(), strict=True)):
            episode.add_score(score, rollout)
            episode.is_measured = False
            episode.details |= {name: values[row] for name, values in details.items()}


def details_by_name(episodes: Sequence[EndedEpisode]) -> dict[str, list[Any]]:
    """Return the details of episodes by name, one value for each episode that has it."""
    details: defaultdict[str, list[Any]] = defaultdict(list)
    for episode in episodes:
        for name, value in episode.details.items():
            details[name].append(value)
    return dict(details)


def detail_means(episodes: Sequence[EndedEpisode]) -> dict[str, float]:
    """Return the mean of every numeric detail that the reward reports, such as the terms of a weighted sum."""
    return {
        name: float(np.mean(values))
        for name, values in details_by_name(episodes).items()
        if name != "non_finite" and all(isinstance(value, numbers.Real) for value in values)
    }


def numeric_details(
    episodes: Sequence[EndedEpisode], rollout: TensorRolloutBuffer
) -> dict[str, npt.NDArray[np.float64]]:
    """Return the details that are numbers by name, one value for each segment of the rollout: `(len(contexts),)`.

    NaN stands where an episode has no such detail, and for a segment in which no episode ended.
    """
    found: dict[str, npt.NDArray[np.float64]] = {}
    for episode in episodes:
        segment = rollout.segments[episode.step, episode.index]
        for name, value in episode.details.items() if segment != DROPPED else ():
            if isinstance(value, numbers.Real):
                found.setdefault(name, np.full(len(rollout.contexts), np.nan))[segment] = value
    return found


def _is_known(info: dict[str, Any]) -> bool:
    return "deferred_reward" not in info or info["deferred_reward"].done()
