"""What a pipeline does not show when it is watched: a guidance of its own form, and what kind of samples it makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rewards.kinds import SampleKind

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
