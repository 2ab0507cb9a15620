"""Unconditional pixel diffusion (DDPM, arXiv 2006.11239) as a `DiffusionModel`: a UNet, and nothing else.

Prompts have no effect, no guidance is possible, and the latent is the image itself, in [-1, 1]. The pipeline cannot
read a LoRA, so the LoRA is saved in peft's format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from diffusers import DDPMPipeline
from torch import Tensor, nn

from ddpo_env.models.image_decoding import to_pixels
from ddpo_env.models.lora.peft_format import save_peft_adapter
from ddpo_env.models.protocol import Conditioning, ModelAbilities
from ddpo_env.models.quantization import loaded_dtype


class DDPMModel(ModelAbilities):
    """Adapter of `DDPMPipeline`; see `ddpo_env.models.DiffusionModel` for each member."""

    def __init__(self, pipeline: DDPMPipeline, source: str) -> None:
        """Read the shapes off the pipeline's configuration and freeze its weights."""
        self.pipeline = pipeline
        self.source = source
        self.scheduler = pipeline.scheduler
        self.denoiser: nn.Module = pipeline.unet.requires_grad_(False).eval()
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape: tuple[int, ...] = (pipeline.unet.config.in_channels, height, width)
        self.conditioning_shapes: dict[str, tuple[int, ...]] = {}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return no conditioning."""
        return {}

    def decode(self, latents: Tensor) -> Tensor:
        """Round latents `(batch, channels, h, w)` to uint8 images `(batch, h, w, 3)`; grey ones become RGB."""
        return to_pixels(latents.expand(-1, 3, -1, -1) if latents.shape[1] == 1 else latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Return the same images before rounding, `(batch, 3, h, w)` in [0, 1]."""
        return (latents.expand(-1, 3, -1, -1).float() / 2 + 0.5).clamp(0, 1)

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the UNet's output (noise, velocity or clean image, as the scheduler's configuration says)."""
        dtype = loaded_dtype(denoiser)
        return cast(Tensor, denoiser(latents.to(dtype), timestep, return_dict=False)[0])

    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Write a LoRA of the UNet in peft's format.

        `pipe.unet = PeftModel.from_pretrained(pipe.unet, folder)` reads it; `.merge_and_unload()` then merges it into
        the UNet.
        """
        save_peft_adapter(denoiser, folder)
