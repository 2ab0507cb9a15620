"""The rewards of several processes as one: what each has measured becomes the scores of the whole batch, everywhere.

A reward whose scores depend on other pictures (`rewards.TwoStageReward`) could not know them while a process sampled
its part. Here every process holds all measurements, and forms the scores as a single process would have: batch by
batch, each of the episodes that ended with the same step, in the order of their slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from agents.distributed import Processes
from agents.rollout.buffer import TensorRolloutBuffer
from agents.rollout.pending_rewards import EndedEpisode
from rewards import MEASUREMENT, NonFinite, SharedReward


def gather_episodes(own: list[EndedEpisode], rollout: TensorRolloutBuffer, processes: Processes) -> list[EndedEpisode]:
    """Return the episodes of all processes, in the order in which one process would have seen them end.

    Args:
        own: this process's, in their order.
        rollout: of all processes, as `gather_rollout` leaves it; the slots of the episodes become its own.
        processes: that share the rollout.
    """
    if processes.count == 1:
        return own
    episodes = []
    for index, part in enumerate(processes.gather_objects(own)):
        for episode in part:
            episode.slot += index * rollout.own_envs
            episodes.append(episode)
    return sorted(episodes, key=lambda episode: (episode.step, episode.slot))


def combine_rewards(
    episodes: Sequence[EndedEpisode], rollout: TensorRolloutBuffer, env: VecEnv, non_finite: NonFinite
) -> None:
    """Give the episodes whose pictures were only measured their rewards, in the rollout and in what is noted of them.

    Args:
        episodes: all that ended in the rollout, in their order.
        rollout: of all processes.
        env: whose attribute `reward` is the `SharedReward` that has measured; other rewards are left as they are.
        non_finite: what becomes of scores that are NaN or infinite, see `rewards.evaluate_reward`.

    Raises:
        Exception: whatever the reward raises, in every process alike.
        ValueError: for a score that is not finite, unless such scores are kept.
    """
    measured = [episode for episode in episodes if MEASUREMENT in episode.details]
    if not measured:
        return
    reward = env.get_attr("reward")[0]
    assert isinstance(reward, SharedReward)
    for _, group in groupby(measured, key=lambda episode: episode.step):
        batch = list(group)
        prompts = [str(rollout.contexts[rollout.segments[episode.step, episode.slot]]) for episode in batch]
        known = {name: values for name, values in columns(batch).items() if len(values) == len(batch)}
        scores, details = reward.combined(known, prompts, non_finite)
        for row, (episode, score) in enumerate(zip(batch, scores.tolist(), strict=True)):
            episode.add(score, rollout)
            del episode.details[MEASUREMENT]
            episode.details |= {name: values[row] for name, values in details.items()}


def columns(episodes: Sequence[EndedEpisode]) -> dict[str, list[Any]]:
    """Return the details of episodes by name, one value of each episode that has it."""
    details: defaultdict[str, list[Any]] = defaultdict(list)
    for episode in episodes:
        for name, value in episode.details.items():
            details[name].append(value)
    return dict(details)
