"""What samples of a prompt have in common when they start from the same noise: it is computed once, and then branches.

They stay the same as long as steps are deterministic, so that the first step with noise is the last one whose denoiser
call they share. MixGRPO's window leaves many such steps (arXiv 2507.21802).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpo_env.tensors import copied_to
from ddpo_env.vector_env import DenoisingVectorEnv


@dataclass(frozen=True)
class EqualRows:
    """Groups of rows of a batch that are equal.

    Attributes:
        first: index of the first row of each group, `(groups,)` int64.
        group: number of each row's group, `(batch,)` int64.
    """

    first: Tensor
    group: Tensor

    def reduce(self, rows: Tensor) -> Tensor:
        """Return one row of each group: `(batch, ...)` → `(groups, ...)`."""
        return rows[self.first]

    def expand(self, rows: Tensor) -> Tensor:
        """Return every row of a batch from one row of each group: `(groups, ...)` → `(batch, ...)`."""
        return rows[self.group]


class SharedPrefix:
    """Knows of each step of a rollout whether samples of a prompt are still the same, and checks that they are.

    Args:
        env: whose samples of a prompt start from the same noise (`shared_noise`).
        stochastic: which steps of an episode have noise, `(steps,)`.
        device: of the observations.

    Raises:
        ValueError: if no step has noise, so that all samples of a prompt would be the same.
    """

    def __init__(
        self, env: DenoisingVectorEnv, stochastic: npt.NDArray[np.bool_], device: torch.device | str = "cpu"
    ) -> None:
        """Find the groups; those at the edges of a process's part may be incomplete."""
        if not stochastic.any():
            raise ValueError(
                "shared_noise must be False with a sampler without noise, which would make all samples of a prompt the "
                "same; got True"
            )
        self._env = env
        self._last = int(np.argmax(stochastic))
        numbers = (env.first_index + np.arange(env.num_envs)) // env.samples_per_prompt
        _, first, group = np.unique(numbers, return_index=True, return_inverse=True)
        self._groups = EqualRows(copied_to(first, device), copied_to(group, device))
        self._differs: Tensor | None = None

    def equal_rows(self, observation: dict[str, Tensor]) -> EqualRows | None:
        """Return the groups of equal rows of an observation, `(batch, ...)` each; `None` if rows may differ."""
        if (self._env.step_index > self._last).any():
            return None
        begins = bool((self._env.step_index == 0).any())
        for name, values in observation.items():
            if name not in ("latents", "timestep") and not begins:
                continue  # the conditioning is constant in an episode
            differs = (values != self._groups.expand(self._groups.reduce(values))).any()
            self._differs = differs if self._differs is None else self._differs | differs
        return self._groups

    def raise_if_different(self) -> None:
        """Raise a `ValueError` if samples of a prompt differed where they were taken to be the same.

        It is read once a rollout, because each reading makes the host wait for the device.
        """
        if self._differs is not None and bool(self._differs):
            raise ValueError(
                "env must keep samples of a prompt the same until the first step with noise, as shared_noise=True "
                "promises, and they differed: a wrapper around the environment changes latents or prompts; remove it"
            )


def shared_prefix_of(
    env: DenoisingVectorEnv | None, stochastic: npt.NDArray[np.bool_] | None, device: torch.device | str
) -> SharedPrefix | None:
    """Return what samples of a prompt have in common in an environment; `None` if they do not start alike."""
    if env is None or stochastic is None or not env.shared_noise:
        return None
    return SharedPrefix(env, stochastic, device)
