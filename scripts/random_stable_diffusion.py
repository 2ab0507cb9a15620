"""Write a small Stable Diffusion with random weights, for benchmarks: it draws nothing, and costs what one costs.

    python scripts/random_stable_diffusion.py FOLDER

Latents 4 × 16 × 16, pictures 64 × 64, a UNet of 1.43 million weights that attends to 77 tokens at 8 × 8. The folder is
in diffusers' layout, for any library that reads it.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ddpo_env.stable_diffusion_1_4 import letter_tokenizer

TOKENS = 77
TEXT_SIZE = 32
LATENT_SIDE = 16


def build_random_stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """Return the pipeline; its weights are the seed's."""
    tokenizer = letter_tokenizer(TOKENS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_SIZE,
                intermediate_size=4 * TEXT_SIZE,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
                projection_dim=TEXT_SIZE,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=LATENT_SIDE,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_SIZE,
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=4 * LATENT_SIDE,
            scaling_factor=0.18215,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="epsilon",
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> int:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build_random_stable_diffusion(arguments.seed).save_pretrained(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
