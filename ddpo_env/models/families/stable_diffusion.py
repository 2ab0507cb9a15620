"""Stable Diffusion 1.x and 2.x as a `DiffusionModel`: one text encoder, a UNet, a VAE.

The prompt's conditioning is the text encoder's last hidden state. What the UNet predicts (the noise in 1.x and
2.1-base, the velocity in 2.1) is the scheduler's `prediction_type`.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ddpo_env.models.families.text_to_image import TextToImageModel
from ddpo_env.models.protocol import Conditioning


class StableDiffusionModel(TextToImageModel):
    """Adapter of `StableDiffusionPipeline`; see `ddpo_env.models.DiffusionModel` for each member."""

    loading_options: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    denoiser_name = "unet"

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """Return `{"prompt_embeds": (1, tokens, hidden)}`."""
        embeds, _ = self.pipeline.encode_prompt(prompt, self.device, 1, False)
        return {"prompt_embeds": embeds}

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the UNet's output (noise, velocity or clean latent, as the scheduler's configuration says)."""
        dtype = next(denoiser.parameters()).dtype
        embeds = conditioning["prompt_embeds"].to(dtype)
        return cast(Tensor, denoiser(latents.to(dtype), timestep, embeds, return_dict=False)[0])
