"""Checks what the rollout of a denoising environment relies on: the next latents are the action, to the last step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class LatentsCheck:
    """Compares actions with the latents that the environment returns, and reads the result once a rollout.

    The buffer stores each latent once, as an action. A wrapper that rescales actions or transforms observations makes
    that wrong, and every log-ratio with it.
    """

    def __init__(self) -> None:
        """Start with a rollout whose latents are unchanged so far."""
        self._is_changed: Tensor | None = None

    def compare(
        self, actions: Tensor, observation: dict[str, Any], dones: npt.NDArray[np.bool_], infos: list[dict[str, Any]]
    ) -> None:
        """Compare one step's actions `(n_envs, ...)` with the next latents; of ended episodes with the last ones.

        Raises:
            ValueError: for an episode that was truncated: it has no sample, and so no reward.
        """
        if any(infos[index].get("TimeLimit.truncated", False) for index in np.flatnonzero(dones)):
            raise ValueError(
                "env must not cut an episode before its sample exists, and one was truncated: it has no reward. Remove "
                "the wrapper that did it, such as TimeLimit (max_episode_steps of gym.make), or let it be at least "
                "num_inference_steps"
            )
        following = torch.as_tensor(observation["latents"]).to(actions.device)
        if dones.any():
            rows = [
                torch.as_tensor(info["terminal_observation"]["latents"]).to(actions.device) if done else row
                for row, done, info in zip(following, dones, infos, strict=True)
            ]
            following = torch.stack(rows)
        is_changed = (following != actions.view_as(following)).any()
        self._is_changed = is_changed if self._is_changed is None else self._is_changed | is_changed

    def raise_if_changed(self) -> None:
        """Raise a `ValueError` if latents differed from the actions."""
        if self._is_changed is not None and bool(self._is_changed):
            raise ValueError(
                "env must return the action as the next observation's latents, and other values came: a wrapper around "
                "the environment changes actions or latents (RescaleAction, TransformObservation, ...); remove it"
            )
