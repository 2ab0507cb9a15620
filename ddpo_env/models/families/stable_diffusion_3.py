"""Stable Diffusion 3 and 3.5 as a `DiffusionModel`: three text encoders, a transformer, flow matching, a VAE.

Esser et al. 2024, arXiv 2403.03206. The prompt's conditioning is the hidden states of all encoders in one sequence, and
the pooled outputs of the two CLIP encoders. A pipeline without its largest encoder (`text_encoder_3=None,
tokenizer_3=None`) has zeros in its place. The flow is sampled as the SDE of Flow-GRPO (arXiv 2505.05470); the policy's
`noise_level` sets its noise.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ddpo_env.models.families.text_to_image import TextToImageModel
from ddpo_env.models.protocol import Conditioning
from ddpo_env.sampler.scheduler_table import resolution_shift

_T5_TOKENS = 256
"""The default of the pipeline's `max_sequence_length`."""


class StableDiffusion3Model(TextToImageModel):
    """Adapter of `StableDiffusion3Pipeline`; see `ddpo_env.models.DiffusionModel` for each member."""

    denoiser_name = "transformer"

    def _patch(self) -> tuple[int, int | None]:
        """Return the side of the transformer's patches, and how many of them fit in a row."""
        config = self.pipeline.transformer.config
        return config.patch_size, config.pos_embed_max_size

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """Return `prompt_embeds` `(1, tokens of CLIP and T5, hidden)` and `pooled_prompt_embeds` `(1, hidden)`."""
        tokenizer = self.pipeline.tokenizer_3
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_T5_TOKENS if tokenizer is None else min(_T5_TOKENS, tokenizer.model_max_length),
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def sampler_options(self, num_inference_steps: int) -> dict[str, Any]:
        """Return the shift of the flow times, if it depends on the image's size."""
        if not self.scheduler.config.use_dynamic_shifting:
            return {}
        _, height, width = self.latent_shape
        patch = self.pipeline.transformer.config.patch_size
        return {"mu": resolution_shift(self.scheduler, (height // patch) * (width // patch))}

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the transformer's velocity, from data to noise."""
        dtype = next(denoiser.parameters()).dtype
        output = denoiser(
            hidden_states=latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )
        return cast(Tensor, output[0])
