"""Whether a policy's model, its spaces and its options belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from gymnasium import spaces

from agents.policy.guidance import can_be_guided, check_guidance
from agents.policy.lora import has_layers
from agents.policy.options import PolicyOptions, policy_options
from ddpo_env.models import DiffusionModel, load_model
from ddpo_env.spaces import DenoisingObservationSpace, ModelHandle


def find_model(
    space: spaces.Space[Any],
    model: str | Path | DiffusionPipeline | DiffusionModel | None,
    num_inference_steps: int | None,
) -> ModelHandle:
    """Return the model and the length of an episode; the observation space names what is not given."""
    if num_inference_steps is not None and num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}")
    if isinstance(space, DenoisingObservationSpace):
        handle = space.handle
        loaded = handle.model if model is None else load_model(model, *handle.variant)
        return ModelHandle.of(loaded, num_inference_steps or handle.num_inference_steps)
    if model is None or num_inference_steps is None:
        raise ValueError(
            "model and num_inference_steps must be given in policy_kwargs, because observation_space does not name "
            f"them: it is a {type(space).__name__}, not a DenoisingObservationSpace"
        )
    return ModelHandle.of(load_model(model), num_inference_steps)


def check_spaces(
    model: DiffusionModel, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], guidance_scale: float
) -> None:
    """Refuse spaces that do not fit the model, and guidance for a model without conditioning."""
    check_guidance(model, guidance_scale)
    expected = {"latents": model.latent_shape, "timestep": (1,), **model.conditioning_shapes}
    boxes = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    found = {name: tuple(space.shape or ()) for name, space in boxes.items()}
    if found != expected or action_space.shape != model.latent_shape:
        raise ValueError(
            f"observation_space must be that of model {model.source!r}, {expected}; got {found} "
            f"with action shape {action_space.shape}"
        )


def options_for(model: DiffusionModel, given: Mapping[str, Any]) -> PolicyOptions:
    """Return the options of a policy: what is given, and of the defaults those that the model can have.

    By default there is no guidance for a model that takes no prompt, and every weight learns of a denoiser without a
    layer that gets an adapter.
    """
    options = policy_options(given)
    if "guidance_scale" not in given and not can_be_guided(model):
        options = replace(options, guidance_scale=1.0)
    is_adapted = bool({"lora_rank", "lora_targets"} & given.keys()) or options.lora is not None
    if not is_adapted and not has_layers(model.denoiser, options.lora_targets):
        options = replace(options, lora_rank=0)
    return options
