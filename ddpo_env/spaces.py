"""The observation space of the denoising MDP: an ordinary ``Dict`` that also says which denoiser it is made for.

An environment and a policy must agree on the model and on the clock. The environment writes both on its space, and the
policy reads them there, so ``PPO(DiffusionPolicy, env)`` needs no second copy of these settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:
    from ddpo_env.models.loading import DiffusionModel

LATENT_BOUND = 100.0
"""Bound of every latent in the spaces. Latents have unit scale; libraries demand finite bounds."""

CONDITIONING_BOUND = 1.0e4
"""Bound of the conditioning tensors in the observation space (text embeddings stay well below 100)."""


class DenoisingObservationSpace(spaces.Dict):
    """State ``s_t = (x_t, t, c)`` of the denoising MDP (Black et al. 2023, section 4.1).

    | key | shape | meaning |
    | --- | --- | --- |
    | `latents` | latent shape, e.g. `(4, 64, 64)` | `x_t`, float32 |
    | `timestep` | `(1,)` | `t` on the scheduler's training scale, float32 |
    | others, e.g. `prompt_embeds` | as the model's text encoder gives them | `c`, float32, constant in an episode |

    Attributes:
        model: what `ddpo_env.load_model` needs to find the denoiser again in this process.
        device: where that model is, e.g. `"cuda:0"`.
        dtype: of its frozen weights, e.g. `"float32"`.
        resolution: that was asked for, in pixels; `None`: the model's own.
        num_inference_steps: length of an episode, which fixes the timesteps.
        conditioning_keys: names of the conditioning tensors.
    """

    def __init__(self, model: DiffusionModel, num_inference_steps: int, seed: int | None = None) -> None:
        """Build the boxes for a loaded model and the length of an episode."""
        boxes: dict[str, spaces.Space[Any]] = {
            "latents": latent_box(model.latent_shape),
            "timestep": spaces.Box(0.0, float(model.scheduler.config.num_train_timesteps), (1,), np.float32),
        }
        for name, shape in model.conditioning_shapes.items():
            boxes[name] = spaces.Box(-CONDITIONING_BOUND, CONDITIONING_BOUND, shape, np.float32)
        super().__init__(boxes, seed=seed)
        weight = next(model.denoiser.parameters())
        self.model = model.source
        self.device = str(weight.device)
        self.dtype = str(weight.dtype).removeprefix("torch.")  # type: ignore[assignment]  # a Dict has none of its own
        self.resolution: int | None = getattr(model, "resolution", None)
        self.num_inference_steps = num_inference_steps
        self.conditioning_keys = tuple(model.conditioning_shapes)


def latent_box(latent_shape: tuple[int, ...]) -> spaces.Box:
    """Box of one latent: the action space, and the `latents` part of the observation space."""
    return spaces.Box(-LATENT_BOUND, LATENT_BOUND, latent_shape, np.float32)
