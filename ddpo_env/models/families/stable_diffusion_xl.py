"""Stable Diffusion XL as a `DiffusionModel`: two text encoders, a UNet that also knows the image's size, a VAE.

Podell et al. 2023, arXiv 2307.01952. The prompt's conditioning is both encoders' hidden states and the second one's
pooled output. The sizes (`time_ids`) are those of an uncropped image of the model's resolution, by default the
pipeline's. They are constants, so they do not belong to the conditioning.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from ddpo_env.models.families.text_to_image import TextToImageModel
from ddpo_env.models.protocol import Conditioning


class StableDiffusionXLModel(TextToImageModel):
    """Adapter of `StableDiffusionXLPipeline`; see `ddpo_env.models.DiffusionModel` for each member."""

    denoiser_name = "unet"

    def __init__(self, pipeline: StableDiffusionXLPipeline, source: str, resolution: int | None = None) -> None:
        """Read the shapes off the pipeline, and freeze its weights; `resolution` is the images' side in pixels."""
        super().__init__(pipeline, source, resolution)
        height, width = (side * pipeline.vae_scale_factor for side in self.latent_shape[1:])
        self.time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device)

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """Return `prompt_embeds` `(1, tokens, hidden of both)` and `pooled_prompt_embeds` `(1, projection)`."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt,
            device=self.device,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @torch.no_grad()
    def negative_conditioning(self) -> dict[str, Tensor]:
        """Return what the pipeline guides away from: zeros, unless its configuration says to encode an empty prompt."""
        with self._text_encoders_on_device():
            _, embeds, _, pooled = self.pipeline.encode_prompt("", device=self.device)
        return {"prompt_embeds": embeds.float(), "pooled_prompt_embeds": pooled.float()}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `(batch, 4, h, w)` to uint8 images `(batch, height, width, 3)`.

        A float16 VAE whose configuration has `force_upcast` would overflow, so it becomes float32.
        """
        vae = self.pipeline.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)
        return super().decode(latents)

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the UNet's output (noise or velocity, as the scheduler's configuration says)."""
        dtype = next(denoiser.parameters()).dtype
        added = {
            "text_embeds": conditioning["pooled_prompt_embeds"].to(dtype),
            "time_ids": self.time_ids.to(latents.device, dtype).expand(len(latents), -1),
        }
        output = denoiser(
            latents.to(dtype),
            timestep,
            conditioning["prompt_embeds"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return cast(Tensor, output[0])
