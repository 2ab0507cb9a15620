"""One denoising episode at a time: the one-slot view of `DenoisingVectorEnv` that `gym.make("DDPO-SD-v0")` returns."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode
from torch import Tensor

from ddpo_env.vector_env import DenoisingVectorEnv, Latents, Observation


class DenoisingEnv(gym.Env[Observation, Latents]):
    """Denoising as a Gymnasium environment.

    Spaces, rewards, starting state, episode end and arguments are those of `ddpo_env.DenoisingVectorEnv`, without the
    batch: an action is one latent, `reset(options={"prompts": "a cat", "latents": latent})` fixes the start. What the
    batch has and one environment cannot have, `num_envs`, `autoreset_mode` and `samples_per_prompt`, may be given and
    must then be what one environment is: 1, disabled, 1.

    Attributes:
        batch: the one-slot `DenoisingVectorEnv` behind this view.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, *, samples_per_prompt: int = 1, **arguments: Any) -> None:
        """Make the one-slot batch; `arguments` are those of `DenoisingVectorEnv`."""
        mode = arguments.pop("autoreset_mode", AutoresetMode.DISABLED)
        if mode != AutoresetMode.DISABLED and mode != AutoresetMode.DISABLED.value:
            raise ValueError(
                f"autoreset_mode of one environment must be {AutoresetMode.DISABLED.value!r}: "
                f"gym.make_vec has the others; got {mode!r}"
            )
        self.batch = DenoisingVectorEnv(
            1, autoreset_mode=AutoresetMode.DISABLED, samples_per_prompt=samples_per_prompt, **arguments
        )
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space
        self.render_mode = self.batch.render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of the prompt and the initial noise.
            options: `prompts` (one prompt) and `latents` (one latent, `latent_shape`).

        Returns:
            The first observation, and an info with the `prompt`.
        """
        super().reset(seed=seed)
        observation, infos = self.batch.reset(seed=seed, options=options)
        return _first(observation), _first_info(infos)

    def step(self, action: Latents) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take the next latent `latent_shape`; see `DenoisingVectorEnv.step` for the errors."""
        shape = self.action_space.shape
        if tuple(np.shape(action)) != shape:
            raise ValueError(f"action must have shape {shape}; got {tuple(np.shape(action))}")
        observation, rewards, terminations, _, infos = self.batch.step(action[None])
        return _first(observation), float(rewards[0]), bool(terminations[0]), False, _first_info(infos)

    def render(self) -> npt.NDArray[np.uint8] | None:  # type: ignore[override]
        """Return the decoded current latent, uint8 `(height, width, 3)`."""
        frames = self.batch.render()
        return None if frames is None else frames[0]


def _first(observation: Observation) -> dict[str, npt.NDArray[np.float32] | Tensor]:
    return {name: value[0] for name, value in observation.items()}


def _first_info(infos: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _first_info(value) if isinstance(value, dict) else value[0]
        for name, value in infos.items()
        if not name.startswith("_")
    }
