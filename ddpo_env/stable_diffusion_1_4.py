"""Stable Diffusion 1.4's published architecture with random weights: for everything that does not depend on them.

Time, memory and the numbers of weights and of floating-point operations are those of the real model; pictures are
noise. The configurations are those of `CompVis/stable-diffusion-v1-4` on the Hugging Face Hub (`unet/config.json` and
so on). The tokenizer is a stand-in that knows letters only.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpo_env.stable_diffusion import StableDiffusionModel

SOURCE = "sd14-random"

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def build_part(name: str) -> Any:
    """Return the `unet`, the `vae` or the `text_encoder`, with fresh weights on torch's default device."""
    if name == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))
    return UNet2DConditionModel(**UNET) if name == "unet" else AutoencoderKL(**VAE)


def letter_tokenizer(tokens: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer with one token a letter or digit, that pads and cuts to `tokens`."""
    letters = [character + ending for ending in ("", "</w>") for character in string.ascii_lowercase + string.digits]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[], unk_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=tokens
    )


def random_stable_diffusion_1_4(device: torch.device, dtype: torch.dtype) -> StableDiffusionModel:
    """Build the model on `device` in `dtype`: 1.07 billion weights, the same in every process of a machine."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        # nn.Module's `to`: diffusers' own warns of modules that are not in these networks.
        parts = {name: nn.Module.to(build_part(name), dtype) for name in ("unet", "vae", "text_encoder")}
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=letter_tokenizer(TEXT_ENCODER["max_position_embeddings"]),
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return StableDiffusionModel(pipeline, SOURCE)
