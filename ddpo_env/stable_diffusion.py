"""Stable Diffusion 1.x and 2.x as a `DiffusionModel`: one text encoder, a UNet, a VAE.

The prompt's conditioning is the text encoder's last hidden state; the latent is the VAE's, times `scaling_factor`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from ddpo_env.models import Conditioning

_CACHED_PROMPTS = 1024
_PIXELS_A_DECODE = 8 * 512 * 512


class StableDiffusionModel:
    """Adapter of `StableDiffusionPipeline`; see `ddpo_env.models.DiffusionModel` for what each member means."""

    loading_options: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}

    def __init__(self, pipeline: StableDiffusionPipeline, source: str) -> None:
        """Read the shapes off the pipeline's configuration and freeze its weights."""
        self.pipeline = pipeline
        self.source = source
        self.scheduler = pipeline.scheduler
        self.denoiser: nn.Module = pipeline.unet
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (pipeline.unet.config.in_channels, height, width)
        text = pipeline.text_encoder.config
        self.conditioning_shapes = {"prompt_embeds": (pipeline.tokenizer.model_max_length, text.hidden_size)}
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return `{"prompt_embeds": (batch, tokens, hidden)}`; each distinct prompt is encoded once.

        Prompts are encoded one by one, so that a prompt's embedding does not depend on the batch that it came in.
        """
        embeds = [self._encode(prompt) for prompt in prompts]
        while len(self._embeddings) > _CACHED_PROMPTS:
            self._embeddings.popitem(last=False)
        return {"prompt_embeds": torch.stack(embeds)}

    def _encode(self, prompt: str) -> Tensor:
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.pipeline.encode_prompt(prompt, self.pipeline.device, 1, False)[0][0].float()
        self._embeddings.move_to_end(prompt)
        return self._embeddings[prompt]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `(batch, 4, h, w)` to uint8 pictures `(batch, height, width, 3)`.

        On an accelerator a few at a time. On a CPU one at a time, so that a picture, and its reward, does not depend on
        the batch that it came in: there a convolution's last bits do, and a level of a pixel with them.
        """
        vae = self.pipeline.vae
        pixels = self.pipeline.vae_scale_factor**2 * latents[0, 0].numel()
        rows = 1 if vae.device.type == "cpu" else max(1, _PIXELS_A_DECODE // pixels)
        scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
        pictures = []
        for chunk in scaled.split(rows):
            image = vae.decode(chunk, return_dict=False)[0].float()
            pictures.append(((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(pictures).permute(0, 2, 3, 1).contiguous()

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the UNet's output (noise, velocity or clean latent, as the scheduler's configuration says)."""
        dtype = next(denoiser.parameters()).dtype
        embeds = conditioning["prompt_embeds"].to(dtype)
        return cast(Tensor, denoiser(latents.to(dtype), timestep, embeds, return_dict=False)[0])

    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Write a LoRA of the UNet in diffusers' format.

        peft's own state dict is saved: converted to diffusers' old key names, a LoRA on attention and convolutions
        loses its attention half when stock `load_lora_weights` reads it. The scale `alpha / rank` is 1, which is what
        diffusers takes where a file does not say.
        """
        self.pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(denoiser))
