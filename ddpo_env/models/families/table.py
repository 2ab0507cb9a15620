"""What a pipeline does not show when it is watched.

A guidance of its own form, what kind of samples it makes, and which arguments of its call are whose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddpo_env.validation.options import shown
from ddpo_env.validation.resolution import Resolution, height_and_width
from rewards.kinds import SampleKind

_STEPS = 4  # of a watched call, which ends at its first one: some schedules are not defined for fewer
_NOT_FREE = (
    *("prompt", "negative_prompt", "latents", "generator", "output_type", "return_dict"),
    *("num_inference_steps", "timesteps", "sigmas", "guidance_scale", "true_cfg_scale"),
    *("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
"""Arguments of a pipeline's call that are not the user's: the environment and the policy give them."""
_GUIDANCE = "the policy combines the two outputs of guidance itself, by guidance_scale alone"
_BATCH = "the environment makes the batch; samples_per_prompt is the number of samples for a prompt"
_STEPS_OF_EPISODE = "an episode has all steps of the sampler; num_inference_steps is their number"
_DECIDED: dict[str, str] = {
    "eta": "the policy draws the sampler's noise; its setting eta is the amount",
    **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"), _BATCH),
    **dict.fromkeys(("guidance_rescale", "cfg_normalization", "cfg_truncation", "cfg_trunc_ratio"), _GUIDANCE),
    **dict.fromkeys(("denoising_start", "denoising_end"), _STEPS_OF_EPISODE),
}
"""Arguments that act outside the watched part of a call, so training would never see them → what decides instead."""

Guide: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
"""Output for the negative prompt, output for the prompt and the scale → the guided output."""


def _guided_with_norm(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Return guidance with the norm of the output for the prompt, along the last axis, as Qwen-Image does it."""
    output = negative + scale * (positive - negative)
    return output * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(output, dim=-1, keepdim=True))


def _guided_from_positive(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Return guidance that counts from the output for the prompt, as Z-Image does it: scale 0 is off."""
    return positive + scale * (positive - negative)


_QWEN = ("", "ControlNet", "ControlNetInpaint", "Edit", "EditInpaint", "EditPlus", "Img2Img", "Inpaint", "Layered")
_Z = ("", "ControlNet", "ControlNetInpaint", "Img2Img", "Inpaint")

GUIDES: dict[str, Guide] = {
    "Lumina2Pipeline": _guided_with_norm,
    **{f"QwenImage{name}Pipeline": _guided_with_norm for name in _QWEN},
    **{f"ZImage{name}Pipeline": _guided_from_positive for name in _Z},
    "Krea2Pipeline": _guided_from_positive,
    "Cosmos2_5_PredictBasePipeline": _guided_from_positive,
    "Cosmos2_5_TransferPipeline": _guided_from_positive,
}
"""diffusers pipeline class → how it combines the two outputs of guidance, if not as `ModelAbilities.guide` does."""


def sample_kind_of(call: Callable[..., Any]) -> SampleKind:
    """Return what a pipeline makes, from the signature of its call."""
    signature = inspect.signature(call)
    if "num_frames" in signature.parameters:
        return "video"
    is_audio = any(name.startswith("audio_") for name in signature.parameters)
    return "audio" if is_audio or "Audio" in str(signature.return_annotation) else "image"


def sampling_rate_of(pipeline: Any) -> int | None:
    """Return the samples per second of an audio pipeline's sounds, as its decoder's configuration says."""
    for name in ("vocoder", "vae"):
        if (component := pipeline.components.get(name)) is not None:
            for setting in ("sampling_rate", "sample_rate"):
                if setting in component.config:
                    return int(component.config[setting])
    return None


def check_arguments(
    arguments: Mapping[str, Any], parameters: Mapping[str, Any], resolution: Resolution | None, source: str
) -> None:
    """Refuse arguments of the user that a pipeline's call does not take, or that are not the user's.

    Raises:
        ValueError: naming the arguments.
    """
    if decided := [name for name in arguments if name in parameters and name in _DECIDED]:
        raise ValueError(
            f"pipeline_arguments must not have {decided[0]} with model {source!r}, because {_DECIDED[decided[0]]}; "
            f"got {decided[0]}={shown(arguments[decided[0]])}"
        )
    taken = [name for name in parameters if name not in _NOT_FREE and name not in _DECIDED]
    if wrong := [str(name) for name in arguments if name not in taken]:
        raise ValueError(
            f"pipeline_arguments must be among {', '.join(taken)} with model {source!r}; got {', '.join(wrong)}"
        )
    if resolution is not None and {"height", "width"} & arguments.keys():
        raise ValueError(f"resolution must be None if height or width is in pipeline_arguments; got {resolution!r}")
    sides = [name for name in ("height", "width") if name in parameters]
    if len(given := [name for name in sides if name in arguments]) == 1 and len(sides) == 2:
        raise ValueError(
            f"pipeline_arguments must have height and width, or neither: resolution is the size; got {given[0]} alone"
        )


def fixed_arguments(
    parameters: Mapping[str, Any], guidance_embeds: bool, resolution: Resolution | None
) -> dict[str, Any]:
    """Return the arguments of every watched call, among those that it takes: its size, and no guidance."""
    fixed: dict[str, Any] = {"num_inference_steps": _STEPS, "output_type": "latent"}
    if "true_cfg_scale" in parameters:
        fixed["true_cfg_scale"] = 1.0
    elif not guidance_embeds:
        fixed["guidance_scale"] = 1.0
    if resolution is not None:
        fixed |= dict(zip(("height", "width"), height_and_width(resolution), strict=True))
    fixed |= {"prompt": None, "use_resolution_binning": False, "min_guidance_scale": 1.0, "max_guidance_scale": 1.0}
    return {name: value for name, value in fixed.items() if name in parameters}
