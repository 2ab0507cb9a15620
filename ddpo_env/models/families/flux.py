"""FLUX.1 as a `DiffusionModel`: CLIP's pooled output and T5's hidden states, a transformer, flow matching, a VAE.

The transformer takes a sequence of 2 × 2 patches. `predict` packs them, and everywhere else a latent has the shape
`(channels, height, width)`. FLUX.1-dev was distilled from a guided model and takes the guidance scale as an input
(`guidance_embeds`): the policy's `guidance_scale` is that input, and the denoiser is called once. FLUX.1-schnell has no
such input; there a scale other than 1 is classifier-free guidance, the pipeline's `true_cfg_scale`. The flow is sampled
as the SDE of Flow-GRPO (arXiv 2505.05470); the policy's `noise_level` sets its noise.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from ddpo_env.models.families.text_to_image import TextToImageModel
from ddpo_env.models.protocol import Conditioning
from ddpo_env.sampler.scheduler_table import resolution_shift

_T5_TOKENS = 512
"""The default of the pipeline's `max_sequence_length`."""


class FluxModel(TextToImageModel):
    """Adapter of `FluxPipeline`; see `ddpo_env.models.DiffusionModel` for each member."""

    denoiser_name = "transformer"

    def __init__(self, pipeline: FluxPipeline, source: str, resolution: int | None = None) -> None:
        """Read the shapes off the pipeline, and freeze its weights; `resolution` is the images' side in pixels."""
        super().__init__(pipeline, source, resolution)
        self.guidance_embeds = pipeline.transformer.config.guidance_embeds

    def _latent_shape(self) -> tuple[int, ...]:
        """Return the latent of the VAE's `sample_size`: the transformer's configuration names no resolution."""
        vae = self.pipeline.vae.config
        side = 2 * (vae.sample_size // (2 * self.pipeline.vae_scale_factor))
        return self.pipeline.transformer.config.in_channels // 4, side, side

    def _patch(self) -> tuple[int, int | None]:
        """Return 2, and no limit: the transformer takes any number of 2 × 2 patches."""
        return 2, None

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """Return `prompt_embeds` `(1, tokens, hidden of T5)` and `pooled_prompt_embeds` `(1, hidden of CLIP)`."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt,
            device=self.device,
            max_sequence_length=min(_T5_TOKENS, self.pipeline.tokenizer_2.model_max_length),
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def sampler_options(self, num_inference_steps: int) -> dict[str, Any]:
        """Return the flow times that the pipeline asks its scheduler for, and the shift for the image's size."""
        _, height, width = self.latent_shape
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        return {"sigmas": sigmas.tolist(), "mu": resolution_shift(self.scheduler, (height // 2) * (width // 2))}

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the transformer's velocity, from data to noise.

        Raises:
            ValueError: without `conditioning["guidance"]`, `(batch,)`, where the transformer takes it.
        """
        if self.guidance_embeds and "guidance" not in conditioning:
            raise ValueError(
                f"conditioning must have guidance, a scale for each of the {len(latents)} latents (3.5 is FLUX.1-dev's "
                f"default), because this transformer takes it as an input; got {', '.join(conditioning)}"
            )
        dtype = next(denoiser.parameters()).dtype
        height, width = latents.shape[-2:]
        embeds = conditioning["prompt_embeds"].to(dtype)
        output = denoiser(
            hidden_states=pack(latents.to(dtype)),
            timestep=timestep.to(dtype) / 1000,
            guidance=conditioning["guidance"] if self.guidance_embeds else None,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=dtype),
            img_ids=image_ids(height, width, latents.device).to(dtype),
            return_dict=False,
        )
        return unpack(cast(Tensor, output[0]), height, width)


def pack(latents: Tensor) -> Tensor:
    """Turn latents `(batch, channels, height, width)` into patches `(batch, height/2 · width/2, 4 · channels)`."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """Turn patches `(batch, height/2 · width/2, 4 · channels)` into latents `(batch, channels, height, width)`."""
    return nn.functional.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Return the position of each patch for the rotary embedding, `(height/2 · width/2, 3)`: 0, row, column."""
    return torch.cartesian_prod(*(torch.arange(length, device=device) for length in (1, height // 2, width // 2)))
