"""The rollouts of several processes as one: after sampling, every process holds all of it.

Advantages, statistics, batches and metrics are then computed as by a single process, from the same numbers everywhere;
an update's rows can be shared out evenly, whoever sampled them. It costs the memory that one process with the same
number of samples needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from agents.distributed import Processes
from agents.rollout.buffer import TensorRolloutBuffer


def gather_rollout(rollout: TensorRolloutBuffer, processes: Processes) -> None:
    """Replace a finished rollout by those of all processes side by side, slot by slot, until its next `reset`."""
    if processes.count == 1:
        return
    own = _host_part(rollout)
    parts = processes.gather_objects(own)
    joined = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in own}
    begins = joined["begins"]
    rollout.n_envs = begins.shape[1]
    rollout.rewards, rollout.episode_starts = joined["rewards"], joined["episode_starts"]
    rollout.last_dones = joined["last_dones"]
    rollout.contexts = joined["contexts"][begins].tolist()
    rollout.segments = _numbered(begins)
    for name in ("values", "log_probs", "advantages", "returns", "actions"):
        setattr(rollout, name, processes.gather_rows(getattr(rollout, name), axis=1))
    rollout.last_values = processes.gather_rows(rollout.last_values)
    for name, store in rollout._step_observations.items():
        rollout._step_observations[name] = processes.gather_rows(store, axis=1)
    offsets = np.cumsum([0, *(part["begins"].sum() for part in parts[:-1])])
    numbers = [part["segments"] + offset for part, offset in zip(parts, offsets, strict=True)]
    order = torch.as_tensor(np.concatenate(numbers, axis=1)[begins], device=rollout.device)
    rollout._joined = {name: processes.gather_rows(rows)[order] for name, rows in rollout._joined.items()}


def _host_part(rollout: TensorRolloutBuffer) -> dict[str, Any]:
    """What is on the host: grids `(buffer_size, n_envs)`, the contexts where their parts begin."""
    begins = rollout.episode_starts.copy()
    begins[0] = True
    contexts = np.full(begins.shape, None, dtype=object)
    contexts[begins] = np.fromiter(rollout.contexts, dtype=object, count=len(rollout.contexts))
    return {
        "begins": begins,
        "contexts": contexts,
        "rewards": rollout.rewards,
        "episode_starts": rollout.episode_starts,
        "segments": rollout.segments,
        "last_dones": rollout.last_dones,
    }


def _numbered(begins: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Number the parts in the order in which they begin, as `TensorRolloutBuffer.add` does."""
    numbers = np.where(begins, begins.ravel().cumsum().reshape(begins.shape) - 1, -1)
    return np.maximum.accumulate(numbers, axis=0)
