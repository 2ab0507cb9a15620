"""Trajectories as tensors on the device; each latent and each prompt's conditioning is stored once.

Sixth stop of the data's path. Stable-Baselines3's dictionary buffer keeps the observation *and* the action of every
step and repeats the conditioning at each. But the latent of the next observation is the action, and the conditioning
is constant, so a trajectory of T steps takes T + 1 latents and one conditioning here. Observations of other
environments are stored as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape
from torch import Tensor

from agents.distributed import Processes
from ddpo_env.spaces import DenoisingObservationSpace
from ddpo_env.tensors import copied_to

TensorObservation: TypeAlias = Tensor | dict[str, Tensor]

DROPPED = -1
"""The segment number of steps that `drop_non_finite` has removed."""


@dataclass(frozen=True)
class Transitions:
    """A batch of transitions out of a `TensorRolloutBuffer`; the first axis of everything is the batch.

    Attributes:
        observations: as the policy takes them.
        actions: `(batch, *action_shape)`.
        log_probs: of the actions when they were taken, `(batch,)`.
        values: the critic's when they were taken, `(batch,)`.
        advantages: `(batch,)`; for reward-weighted regression the weights of the samples.
        returns: targets of the critic, `(batch,)`.
    """

    observations: TensorObservation
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class TensorRolloutBuffer:
    """One rollout of `buffer_size` steps in `n_envs` environments.

    Attributes:
        rewards: `(buffer_size, n_envs)` float32 on the host.
        episode_starts: `(buffer_size, n_envs)` bool on the host.
        scored: `(buffer_size, n_envs)` bool on the host: whether a step has a log-probability. A step without noise has
            none, and an algorithm that needs one does not train on it.
        segments: `(buffer_size, n_envs)` int64 on the host: the segment that a step belongs to. A segment is an episode
            or the part of one that is in the rollout. Segments are numbered from 0; removed steps have `DROPPED`.
        contexts: per segment, the context of its episode (the prompt), or `None`.
        dropped_contexts: contexts of the removed segments.
        details: per name, a number for each segment that the reward reported beside its score, `(len(contexts),)`
            float64; NaN where there is none. Set when all scores are known.
        values, log_probs, advantages, returns: `(buffer_size, n_envs)` float32 on `device`.
        actions: `(buffer_size, n_envs, *action_shape)` on `device`.

    Args:
        buffer_size: steps of one environment.
        observation_space: of one environment.
        action_space: of one environment.
        device: where tensors are kept.
        gae_lambda: for `agents.GeneralizedAdvantage`.
        gamma: discount.
        n_envs: sub-environments in the batch.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        gae_lambda: float = 1.0,
        gamma: float = 1.0,
        n_envs: int = 1,
    ) -> None:
        """Allocate what does not depend on the number of episodes; see the class docstring for the arguments."""
        self.buffer_size = buffer_size
        self.observation_space = observation_space
        self.action_space = action_space
        self.device = torch.device(device)
        self.gae_lambda = gae_lambda
        self.gamma = gamma
        self.own_envs = n_envs
        self._denoising = isinstance(observation_space, DenoisingObservationSpace)
        self._allocate()
        self.reset()

    def _allocate(self) -> None:
        self.n_envs = self.own_envs
        grid = (self.buffer_size, self.n_envs)
        self.rewards = np.zeros(grid, np.float32)
        self.episode_starts = np.zeros(grid, np.bool_)
        self.segments = np.zeros(grid, np.int64)
        self.scored = np.ones(grid, np.bool_)
        self.values = torch.zeros(grid, device=self.device)
        self.log_probs = torch.zeros(grid, device=self.device)
        self.advantages = torch.zeros(grid, device=self.device)
        self.returns = torch.zeros(grid, device=self.device)
        dtype = torch.int64 if isinstance(self.action_space, spaces.Discrete) else torch.float32
        self.actions = torch.zeros((*grid, *(self.action_space.shape or ())), dtype=dtype, device=self.device)
        self._step_observations = {
            name: torch.zeros((*grid, *shape), dtype=dtype, device=self.device)
            for name, (shape, dtype) in self._step_layout().items()
        }

    def reset(self) -> None:
        """Discard the rollout, and what other processes added to it."""
        if self.n_envs != self.own_envs:
            self._allocate()
        self.pos = 0
        self.full = False
        self.contexts: list[Any] = []
        self.dropped_contexts: list[Any] = []
        self.details: dict[str, npt.NDArray[np.float64]] = {}
        self.last_values = torch.zeros(self.n_envs, device=self.device)
        self.last_dones = np.zeros(self.n_envs, np.bool_)
        self._segment_observations: dict[str, list[Tensor]] = {name: [] for name in self._segment_keys()}
        self._joined: dict[str, Tensor] = {}
        self._scored: list[Tensor] = []
        self.scored[:] = True

    def size(self) -> int:
        """Return the number of steps that are stored, as in Stable-Baselines3."""
        return self.buffer_size if self.full else self.pos

    def add(
        self,
        observation: TensorObservation,
        actions: Tensor,
        rewards: npt.NDArray[np.floating],
        episode_starts: npt.NDArray[np.bool_],
        values: Tensor,
        log_probs: Tensor,
        contexts: Sequence[Any],
        scored: Tensor | None = None,
    ) -> None:
        """Append one step of every sub-environment.

        Args:
            observation: before the step, `(n_envs, ...)`.
            actions: `(n_envs, *action_shape)`.
            rewards: `(n_envs,)`.
            episode_starts: whether `observation` is the first of an episode, `(n_envs,)`.
            values: `(n_envs, 1)` or `(n_envs,)`.
            log_probs: `(n_envs,)`.
            contexts: context of each sub-environment's current episode.
            scored: whether the step has a log-probability, `(n_envs,)` bool, in all steps of a rollout or in none.
                Default: it has one.

        Raises:
            ValueError: if the buffer is full.
        """
        if self.full:
            raise ValueError(f"buffer_size={self.buffer_size} steps are stored already: call reset() first")
        step = self.pos
        begins = np.asarray(episode_starts, dtype=np.bool_) | (step == 0)
        if step:
            self.segments[step] = self.segments[step - 1]
        self.segments[step, begins] = len(self.contexts) + np.arange(begins.sum())
        self.contexts += [context for context, new in zip(contexts, begins, strict=True) if new]
        observation = observation if isinstance(observation, dict) else {"": observation}
        if begins.any():
            rows = copied_to(np.flatnonzero(begins), self.device)
            for name, stored in self._segment_observations.items():
                stored.append(observation[name].to(self.device)[rows])
        for name, store in self._step_observations.items():
            store[step] = torch.as_tensor(observation[name], device=self.device).reshape(store[step].shape)
        self.rewards[step] = rewards
        self.episode_starts[step] = episode_starts
        self.actions[step] = actions.reshape(self.actions[step].shape)
        self.values[step] = values.flatten()
        self.log_probs[step] = log_probs
        self._scored += [] if scored is None else [scored]
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def finish(self, last_values: Tensor, last_dones: npt.NDArray[np.bool_]) -> None:
        """Close the rollout.

        Args:
            last_values: the critic's, after the last step, `(n_envs,)` or `(n_envs, 1)`.
            last_dones: which episodes ended with the last step, `(n_envs,)`.
        """
        self.last_values = last_values.flatten()
        self.last_dones = np.asarray(last_dones, dtype=np.bool_)
        if self._scored:  # read at once, because each reading makes the host wait for the device
            self.scored, self._scored = torch.stack(self._scored).cpu().numpy(), []
        self._joined = {name: torch.cat(stored) for name, stored in self._segment_observations.items()}
        self._segment_observations = {name: [] for name in self._segment_keys()}

    def gather(self, processes: Processes) -> None:
        """Put the rollouts of all processes side by side, sub-environment by sub-environment, until `reset`.

        Every process then holds the whole rollout. Advantages, statistics, batches and metrics are computed from the
        same numbers everywhere, and any process can compute any row of an update. This takes the memory of one process
        with the same number of samples.
        """
        if processes.count == 1:
            return
        begins = self.episode_starts.copy()
        begins[0] = True
        contexts = np.full(begins.shape, None, dtype=object)
        contexts[begins] = np.fromiter(self.contexts, dtype=object, count=len(self.contexts))
        own: dict[str, Any] = {
            "begins": begins,
            "contexts": contexts,
            "rewards": self.rewards,
            "episode_starts": self.episode_starts,
            "segments": self.segments,
            "scored": self.scored,
            "last_dones": self.last_dones,
        }
        gathered = processes.gather_objects(own)
        joined = {name: np.concatenate([one[name] for one in gathered], axis=-1) for name in own}
        begins = joined["begins"]
        self.n_envs = begins.shape[1]
        self.rewards, self.episode_starts = joined["rewards"], joined["episode_starts"]
        self.last_dones, self.scored = joined["last_dones"], joined["scored"]
        self.contexts = joined["contexts"][begins].tolist()
        self.segments = _numbered(begins)
        for name in ("values", "log_probs", "advantages", "returns", "actions"):
            setattr(self, name, processes.gather_rows(getattr(self, name), axis=1))
        self.last_values = processes.gather_rows(self.last_values)
        for name, store in self._step_observations.items():
            self._step_observations[name] = processes.gather_rows(store, axis=1)
        offsets = np.cumsum([0, *(one["begins"].sum() for one in gathered[:-1])])
        numbers = [one["segments"] + offset for one, offset in zip(gathered, offsets, strict=True)]
        order = torch.as_tensor(np.concatenate(numbers, axis=1)[begins], device=self.device)
        self._joined = {name: processes.gather_rows(rows)[order] for name, rows in self._joined.items()}

    def drop_non_finite(self) -> None:
        """Remove the segments with a NaN or infinite reward, as if they had not been sampled.

        The other segments are numbered anew. The grid keeps the removed steps, with reward 0 and segment `DROPPED`;
        nothing that goes by segments or by `kept_steps` reads them.
        """
        spoiled = np.unique(self.segments[~np.isfinite(self.rewards)])
        if not len(spoiled):
            return
        kept = np.setdiff1d(np.arange(len(self.contexts)), spoiled)
        numbers = np.full(len(self.contexts), DROPPED)
        numbers[kept] = np.arange(len(kept))
        self.segments = numbers[self.segments]
        self.rewards[self.segments == DROPPED] = 0
        self.dropped_contexts = [self.contexts[segment] for segment in spoiled]
        self.contexts = [self.contexts[segment] for segment in kept]
        rows = torch.as_tensor(kept, device=self.device)
        self._joined = {name: segments[rows] for name, segments in self._joined.items()}

    def kept_steps(self) -> npt.NDArray[np.int64]:
        """Return the flat indices of all steps that were not removed, ascending."""
        return np.flatnonzero(self.segments != DROPPED)

    def set_monte_carlo_returns(self) -> None:
        """Set `returns`, the critic's targets, to the discounted sum of the rewards from each step on.

        Where the rollout cuts an episode, the critic's last value stands for the rest. Estimators with better targets
        set their own.
        """
        following = np.where(self.last_dones, 0.0, self.last_values.cpu().numpy())
        returns = np.empty(self.rewards.shape)
        for step in reversed(range(self.buffer_size)):
            following = self.rewards[step] + self.gamma * following
            returns[step] = following
            following = np.where(self.episode_starts[step], 0.0, following)
        self.returns = copied_to(returns.astype(np.float32), self.device)

    def segment_returns(self) -> npt.NDArray[np.float64]:
        """Return the sum of rewards of each segment, `(len(contexts),)`."""
        kept = self.kept_steps()
        sums = np.bincount(self.segments.ravel()[kept], self.rewards.ravel()[kept], len(self.contexts))
        return sums.astype(np.float64)

    def complete_segments(self) -> npt.NDArray[np.bool_]:
        """Return which segments are whole episodes, `(len(contexts),)`."""
        complete = np.ones(len(self.contexts), np.bool_)
        cut = np.append(self.segments[0][~self.episode_starts[0]], self.segments[-1][~self.last_dones])
        complete[cut[cut != DROPPED]] = False
        return complete

    def final_steps(self) -> npt.NDArray[np.int64]:
        """Return the flat indices of the last step of every episode that ends in this rollout and was not removed."""
        ends = np.append(self.episode_starts[1:], self.last_dones[None], axis=0)
        return np.flatnonzero(ends & (self.segments != DROPPED))

    def per_step(self, segment_values: npt.NDArray[np.floating]) -> Tensor:
        """Give every step the value of its segment: `(len(contexts),)` → `(buffer_size, n_envs)` on the device.

        Removed steps get 0.
        """
        values = np.append(segment_values, 0.0)  # `DROPPED` is the index of the last one
        return copied_to(values[self.segments].astype(np.float32), self.device)

    def __getitem__(self, indices: npt.NDArray[np.int64]) -> Transitions:
        """Return the transitions at flat indices `step * n_envs + sub-environment`."""
        chosen = copied_to(indices, self.device)
        return Transitions(
            observations=self._observations(np.asarray(indices), chosen),
            actions=self.actions.flatten(0, 1)[chosen],
            log_probs=self.log_probs.flatten()[chosen],
            values=self.values.flatten()[chosen],
            advantages=self.advantages.flatten()[chosen],
            returns=self.returns.flatten()[chosen],
        )

    @property
    def nbytes(self) -> int:
        """Number of bytes of all tensors and arrays that hold the rollout."""
        tensors = [self.values, self.log_probs, self.advantages, self.returns, self.actions]
        tensors += [*self._step_observations.values(), *self._joined.values()]
        tensors += [rows for stored in self._segment_observations.values() for rows in stored]
        arrays = (self.rewards, self.episode_starts, self.segments, self.scored)
        return sum(t.nbytes for t in tensors) + sum(a.nbytes for a in arrays)

    def _observations(self, indices: npt.NDArray[np.int64], chosen: Tensor) -> TensorObservation:
        stored = {name: store.flatten(0, 1)[chosen] for name, store in self._step_observations.items()}
        if not self._denoising:
            return stored.get("", stored)
        segments = self.segments.ravel()
        first = np.ones(self.segments.shape, np.bool_)
        np.not_equal(self.segments[1:], self.segments[:-1], out=first[1:])
        rows = copied_to(segments[indices], self.device)
        joined = {name: stored[rows] for name, stored in self._joined.items()}
        previous = self.actions.flatten(0, 1)[(chosen - self.n_envs).clamp(min=0)]
        begins = copied_to(first.ravel()[indices], self.device).view(-1, *[1] * (previous.ndim - 1))
        return {**stored, **joined, "latents": torch.where(begins, joined["latents"], previous)}

    def _segment_keys(self) -> tuple[str, ...]:
        if isinstance(self.observation_space, DenoisingObservationSpace):
            return ("latents", *self.observation_space.conditioning_keys)
        return ()

    def _step_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of what is stored at every step, by name; "" names an observation without names."""
        space = self.observation_space
        boxes = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        layout = {}
        for name, box in boxes.items():
            shape = get_obs_shape(box)
            if isinstance(shape, dict):
                raise ValueError(f"observation_space must not nest dictionaries; {name!r} is a {box}")
            if name not in self._segment_keys():
                layout[name] = (shape, _torch_dtype(box))
        return layout


def _torch_dtype(space: spaces.Space[Any]) -> torch.dtype:
    """Return the dtype in which observations are kept: the space's own, but float32 for float64."""
    dtype = torch.as_tensor(np.empty(0, space.dtype)).dtype
    return torch.float32 if dtype == torch.float64 else dtype


def _numbered(begins: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Number the segments in the order in which they begin, as `TensorRolloutBuffer.add` does."""
    numbers = np.where(begins, begins.ravel().cumsum().reshape(begins.shape) - 1, -1)
    return np.maximum.accumulate(numbers, axis=0)
