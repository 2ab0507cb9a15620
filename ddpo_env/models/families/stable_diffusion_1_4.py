"""The bundled model `sd14-random`: Stable Diffusion 1.4's published architecture with random weights.

See `ddpo_env.models.random_pipelines`, where the architecture is.
"""

from __future__ import annotations

from typing import Any

import torch

from ddpo_env.models import random_pipelines
from ddpo_env.models.families.stable_diffusion import StableDiffusionModel
from ddpo_env.models.random_pipelines import ARCHITECTURES, build_pipeline, letter_tokenizer

__all__ = ["SCHEDULER", "SOURCE", "TEXT_ENCODER", "build_part", "letter_tokenizer", "random_stable_diffusion_1_4"]

SOURCE = "sd14-random"
TEXT_ENCODER: dict[str, Any] = ARCHITECTURES["sd14"].text_encoders[0]
SCHEDULER: dict[str, Any] = ARCHITECTURES["sd14"].scheduler[1]


def build_part(name: str) -> Any:
    """Return the `unet`, the `vae` or the `text_encoder`, with fresh weights on torch's default device."""
    return random_pipelines.build_part("sd14", name)


def random_stable_diffusion_1_4(device: torch.device, dtype: torch.dtype) -> StableDiffusionModel:
    """Build the model on `device` in `dtype`: 1.07 billion weights, the same in every process of a machine."""
    return StableDiffusionModel(build_pipeline("sd14", device, dtype), SOURCE)
