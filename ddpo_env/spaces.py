"""The observation space of the denoising MDP: an ordinary ``Dict`` that also carries the model it is made for.

An environment and a policy must agree on the model and on the timesteps. The environment puts both into the handle of
its space, and the policy reads them there, so ``PPO(DiffusionPolicy, env)`` needs no second copy of these settings.
Two such spaces are equal only if model, resolution and timesteps are the same, so a trained policy refuses the
environment of another model.
"""

from __future__ import annotations

import copyreg
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import spaces

from ddpo_env.models.families.pipeline_model import PipelineModel
from ddpo_env.models.loading import load_model
from ddpo_env.models.protocol import DiffusionModel, abilities_of
from ddpo_env.models.quantization import loaded_dtype, quantization_of
from ddpo_env.validation.resolution import Resolution

LATENT_BOUND = 100.0
"""Bound of every latent in the observation space. Latents have unit scale; libraries demand finite bounds."""

ACTION_BOUND = 3.0
"""Bound of every latent in the action space, in standard deviations of the initial noise.

Many libraries let an agent act in [-1, 1] and stretch that to the box, so the box must have the scale of latents. Of
standard normal numbers, one in 370 is outside; a latent there is taken as it is."""

CONDITIONING_BOUND = 1.0e4
"""Bound of the conditioning tensors in the observation space (text embeddings stay well below 100)."""


@dataclass(frozen=True, kw_only=True)
class ModelHandle:
    """The model that an environment is made for, and the length of its episodes.

    A copy is the same object. A pickle holds names and no weights: an unpickled handle finds its model in the process,
    or loads it, when `model` is read for the first time.

    Attributes:
        source: name by which `ddpo_env.load_model` finds the model in this process.
        device: device of the model, e.g. `"cuda:0"`.
        dtype: dtype of its frozen weights, e.g. `"float32"`.
        resolution: of the images in pixels if it is not the model's own, `512` or `"832x1216"`; else `None`.
        pipeline_arguments: of every call of the model's pipeline.
        quantization: of its frozen weights, e.g. `"int8"`; `None` if there is none.
        num_inference_steps: length of an episode, which fixes the timesteps.
        identity: what tells the model's weights from others in any process, see `ModelAbilities.identity`.
        scheduler: class of the model's scheduler, and a hash of its configuration.
    """

    source: str
    device: str
    dtype: str
    resolution: Resolution | None
    pipeline_arguments: Mapping[str, Any] = field(hash=False)
    quantization: str | None
    num_inference_steps: int
    identity: str
    scheduler: str

    @classmethod
    def of(cls, model: DiffusionModel, num_inference_steps: int) -> ModelHandle:
        """Return the handle of a loaded model, which it holds."""
        handle = cls(
            source=model.source,
            device=str(next(model.denoiser.parameters()).device),
            dtype=str(loaded_dtype(model.denoiser)).removeprefix("torch."),
            resolution=abilities_of(model).resolution,
            pipeline_arguments=dict(abilities_of(model).arguments),
            quantization=quantization_of(model.denoiser),
            num_inference_steps=num_inference_steps,
            identity=abilities_of(model).identity or model.source,
            scheduler=_describe(model.scheduler),
        )
        vars(handle)["model"] = model  # what the property finds has been found
        return handle

    def is_same_task(self, other: ModelHandle) -> bool:
        """Whether the other has the same weights, sizes and timesteps, from any folder, in any dtype."""
        names = ("identity", "resolution", "pipeline_arguments", "quantization", "num_inference_steps", "scheduler")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def variant(self) -> tuple[Any, ...]:
        """The arguments with which `ddpo_env.load_model` loads another model in the same way."""
        return self.device, self.dtype, self.resolution, self.pipeline_arguments, self.quantization

    @cached_property
    def model(self) -> DiffusionModel:
        """The model itself.

        Raises:
            ValueError: in a process to which the handle was pickled, for a model object that is not there.
        """
        return load_model(self.source, *self.variant)

    def __copy__(self) -> ModelHandle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHandle:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "model"}


def _model_of(handle: ModelHandle) -> DiffusionModel:
    return handle.model


def _by_name(model: PipelineModel) -> tuple[Callable[..., Any], tuple[ModelHandle]]:
    return _model_of, (ModelHandle.of(model, 0),)


# A pipeline's model has members that cannot be pickled, and weights that a copy of an environment shares.
copyreg.pickle(PipelineModel, _by_name)


class DenoisingObservationSpace(spaces.Dict):
    """State ``s_t = (x_t, t, c)`` of the denoising MDP (Black et al. 2023, section 4.1).

    | key | shape | meaning |
    | --- | --- | --- |
    | `latents` | latent shape, e.g. `(4, 64, 64)` | `x_t`, float32 |
    | `timestep` | `(1,)` | `t` on the scheduler's training scale, float32 |
    | others, e.g. `prompt_embeds` | as the model's text encoder returns them | `c`, float32, constant in an episode |

    Two of these spaces are equal if weights, resolution and timesteps are the same.

    Attributes:
        handle: the model and the length of an episode.
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
        self.handle = ModelHandle.of(model, num_inference_steps)
        self.conditioning_keys = tuple(model.conditioning_shapes)

    def __eq__(self, other: object) -> bool:
        """Whether the other space is of the same model, resolution and timesteps; an ordinary `Dict` names no model."""
        return (
            isinstance(other, DenoisingObservationSpace)
            and super().__eq__(other)
            and self.handle.is_same_task(other.handle)
        )


def latent_box(latent_shape: tuple[int, ...]) -> spaces.Box:
    """Return the box of the `latents` in the observation space."""
    return spaces.Box(-LATENT_BOUND, LATENT_BOUND, latent_shape, np.float32)


def action_box(latent_shape: tuple[int, ...]) -> spaces.Box:
    """Return the action space: the box of the next latent."""
    return spaces.Box(-ACTION_BOUND, ACTION_BOUND, latent_shape, np.float32)


def _describe(scheduler: Any) -> str:
    config = scheduler.config if isinstance(scheduler.config, Mapping) else vars(scheduler.config)
    settings = sorted((name, repr(value)) for name, value in config.items() if not name.startswith("_"))
    return f"{type(scheduler).__name__} {hashlib.sha256(repr(settings).encode()).hexdigest()}"
