"""One denoising episode at a time: the view of one sub-environment that `gym.make("DDPO-SD-v0")` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from torch import Tensor

from ddpo_env.models.loading import with_plain_values
from ddpo_env.models.protocol import DiffusionModel
from ddpo_env.validation.arguments import as_float
from ddpo_env.validation.choices import Quantization
from ddpo_env.validation.resolution import Resolution
from ddpo_env.vector_env import DenoisingVectorEnv, Latents, Observation
from rewards import NonFinite


class DenoisingEnv(gym.Env[Observation, Latents]):
    """Denoising as a Gymnasium environment: a batch of one.

    `ddpo_env.DenoisingVectorEnv` documents spaces, rewards, starting state, episode end and arguments. Here they have
    no batch axis: an action is one latent, and `reset(options={"prompts": "a cat", "latents": latent})` fixes the
    start. The arguments `num_envs`, `autoreset_mode`, `samples_per_prompt` and `deferred_rewards` may be given; their
    only values are 1, disabled, 1 and false. With `backend="torch"` pass `disable_env_checker=True` to `gym.make`:
    Gymnasium's checker knows NumPy arrays only, and warns in the first steps. Copies share the model. A pickle has its
    name and no weights.

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("ddpo_env:DDPO-SD-v0", num_inference_steps=1)
    >>> observation, info = env.reset(seed=0, options={"prompts": "a fox"})
    >>> observation["latents"].shape
    (4, 16, 16)
    >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    >>> terminated, info["prompt"], info["image"].shape
    (True, 'a fox', (64, 64, 3))

    ```

    Attributes:
        batch: the `DenoisingVectorEnv` with one sub-environment behind this view.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    _spec: EnvSpec | None = None

    def __init__(
        self,
        *,
        num_envs: int = 1,
        model: str | Path | DiffusionPipeline | DiffusionModel = "tiny",
        reward: str | Callable[..., Any] = "jpeg_compressibility",
        reward_options: Mapping[str, Any] | None = None,
        prompts: Any = "simple_animals",
        num_inference_steps: int = 20,
        max_episode_steps: None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        resolution: Resolution | None = None,
        pipeline_arguments: Mapping[str, Any] | None = None,
        quantization: Quantization | None = None,
        backend: str = "numpy",
        autoreset_mode: str | AutoresetMode = AutoresetMode.DISABLED,
        samples_per_prompt: int = 1,
        shared_noise: bool = False,
        part: tuple[int, int] = (0, 1),
        deferred_rewards: bool = False,
        non_finite_rewards: NonFinite = "raise",
        render_mode: str | None = None,
    ) -> None:
        """Make the batch of one; the arguments are those of `DenoisingVectorEnv`."""
        arguments = {name: value for name, value in locals().items() if name != "self"}
        for name, only in (
            ("num_envs", (1,)),
            ("samples_per_prompt", (1,)),
            ("autoreset_mode", (AutoresetMode.DISABLED.value, AutoresetMode.DISABLED)),
            ("deferred_rewards", (False,)),
        ):
            if arguments[name] not in only:
                raise ValueError(
                    f"{name} of one environment must be {only[0]!r}, use gym.make_vec for other values; "
                    f"got {arguments[name]!r}"
                )
        self.batch = DenoisingVectorEnv(**arguments)
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space
        self.render_mode = self.batch.render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: seed of the prompt and the initial noise.
            options: `prompts` (one prompt) and `latents` (one latent, `latent_shape`).

        Returns:
            The first observation, and an info with the `prompt`.
        """
        observation, infos = self.batch.reset(seed=seed, options=options)
        return _first(observation), _first_info(infos)

    def step(self, action: Latents) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take the next latent `latent_shape`; see `DenoisingVectorEnv.step` for the errors."""
        shape, given = self.action_space.shape, as_float(action, "action")
        if tuple(given.shape) != shape:
            raise ValueError(f"action must have shape {shape}; got {tuple(given.shape)}")
        actions = given[None]
        observation, rewards, terminations, _, infos = self.batch.step(actions)
        return _first(observation), float(rewards[0]), bool(terminations[0]), False, _first_info(infos)

    def render(self) -> npt.NDArray[np.uint8] | None:
        """Return the decoded current latent, uint8 `(height, width, 3)`."""
        frames = self.batch.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Close the batch."""
        self.batch.close()

    @property
    def np_random(self) -> np.random.Generator:
        """The generator of the prompt and the initial noise."""
        return self.batch.np_random[0]

    @np_random.setter
    def np_random(self, generator: np.random.Generator) -> None:
        self.batch.np_random = (generator,)

    @property
    def np_random_seed(self) -> int:
        """The seed of the generator; -1 if it is not known."""
        return self.batch.np_random_seed[0]

    @property
    def _np_random(self) -> np.random.Generator:  # type: ignore[override]
        return self.np_random  # where Gymnasium's checker looks for it

    @property
    def spec(self) -> EnvSpec | None:
        """What Gymnasium made this environment from; it names a model object and does not hold it."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = with_plain_values(spec, self.batch.model)


def _first(observation: Observation) -> dict[str, npt.NDArray[np.float32] | Tensor]:
    return {name: value[0] for name, value in observation.items()}


def _first_info(infos: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _first_info(value) if isinstance(value, dict) else value[0]
        for name, value in infos.items()
        if not name.startswith("_")
    }
