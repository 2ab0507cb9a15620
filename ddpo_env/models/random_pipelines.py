"""Pipelines with random weights, in published architectures and in small ones: for all that weights do not matter to.

Time, memory and the numbers of weights and of floating-point operations are those of the real model; pictures are
noise. The published configurations are those of `CompVis/stable-diffusion-v1-4` and
`stabilityai/stable-diffusion-xl-base-1.0` on the Hugging Face Hub (`unet/config.json` and so on); the tokenizer is a
stand-in that knows letters only. This file imports torch, diffusers and transformers and nothing of this package, so
that it can be read where the package is not installed (`scripts/benchmarks/random_stable_diffusion.py`).
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class Architecture(NamedTuple):
    """Configurations of a pipeline's parts.

    Attributes:
        unet: of `UNet2DConditionModel`.
        vae: of `AutoencoderKL`.
        text_encoders: of one `CLIPTextModel`; of two, the second with a projection, in SDXL.
        scheduler: its class and configuration.
        knows_letters: whether the text encoder's special tokens are those of `letter_tokenizer`.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    scheduler: tuple[Any, dict[str, Any]]
    knows_letters: bool = False


_SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_KL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
}
_CLIP_L: dict[str, Any] = {
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
_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}
_SMALL_CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 32,
}
_SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
}
_SMALL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_EULER: dict[str, Any] = {
    **_SCHEDULE,
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

ARCHITECTURES: dict[str, Architecture] = {
    "small": Architecture(
        unet={**_SMALL_UNET, "cross_attention_dim": 32},
        vae={**_SMALL_VAE, "scaling_factor": 0.18215},
        text_encoders=(_SMALL_CLIP,),
        scheduler=(
            DDIMScheduler,
            {
                **_SCHEDULE,
                "clip_sample": False,
                "prediction_type": "epsilon",
                "set_alpha_to_one": False,
                "steps_offset": 1,
            },
        ),
        knows_letters=True,
    ),
    "small-sdxl": Architecture(
        unet={
            **_SMALL_UNET,
            "cross_attention_dim": 64,
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        vae={**_SMALL_VAE, "scaling_factor": 0.13025, "force_upcast": True},
        text_encoders=(_SMALL_CLIP, {**_SMALL_CLIP, "hidden_act": "gelu"}),
        scheduler=(EulerDiscreteScheduler, _EULER),
        knows_letters=True,
    ),
    "sd14": Architecture(
        unet={
            **_UNET,
            "sample_size": 64,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        vae={**_KL, "sample_size": 512},
        text_encoders=(_CLIP_L,),
        scheduler=(
            PNDMScheduler,
            {
                "num_train_timesteps": 1000,
                **_SCHEDULE,
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "steps_offset": 1,
            },
        ),
    ),
    "sdxl": Architecture(
        unet={
            **_UNET,
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],  # in truth the number of heads of each level
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**_KL, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        text_encoders=(
            _CLIP_L,
            {
                **_CLIP_L,
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "projection_dim": 1280,
                "num_hidden_layers": 32,
                "num_attention_heads": 20,
                "hidden_act": "gelu",
            },
        ),
        scheduler=(EulerDiscreteScheduler, _EULER),
    ),
}
"""Two published architectures, and two small ones of the same families: latents 4 × 16 × 16, pictures 64 × 64."""


def letter_tokenizer(tokens: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer with one token a letter or digit, that pads and cuts to `tokens`."""
    letters = [character + ending for ending in ("", "</w>") for character in string.ascii_lowercase + string.digits]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[], unk_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=tokens
    )


def build_part(architecture: str, name: str) -> Any:
    """Return `unet`, `vae`, `text_encoder` or `text_encoder_2`, with fresh weights on torch's default device."""
    described = ARCHITECTURES[architecture]
    if name == "unet":
        return UNet2DConditionModel(**described.unet)
    if name == "vae":
        return AutoencoderKL(**described.vae)
    is_second = name == "text_encoder_2"
    settings = dict(described.text_encoders[int(is_second)])
    if described.knows_letters:
        tokenizer = letter_tokenizer(settings["max_position_embeddings"])
        settings |= {"vocab_size": len(tokenizer)}
        settings |= {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return (CLIPTextModelWithProjection if is_second else CLIPTextModel)(CLIPTextConfig(**settings))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new weights in a dtype, so that they are never in memory as float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_pipeline(
    architecture: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> DiffusionPipeline:
    """Return a pipeline with random weights, the same in every process of a machine.

    Args:
        architecture: a name in `ARCHITECTURES`.
        device: of the weights.
        dtype: of the weights.
        seed: of the weights.

    Raises:
        ValueError: for an unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}; got {architecture!r}")
    described = ARCHITECTURES[architecture]
    encoders = [f"text_encoder{suffix}" for suffix in ("", "_2")[: len(described.text_encoders)]]
    with torch.random.fork_rng(), torch.device(device), _default_dtype(dtype):
        torch.manual_seed(seed)
        parts = {name: build_part(architecture, name) for name in (*encoders, "unet", "vae")}
    for suffix, settings in zip(("", "_2"), described.text_encoders, strict=False):
        parts[f"tokenizer{suffix}"] = letter_tokenizer(settings["max_position_embeddings"])
    scheduler_class, settings = described.scheduler
    parts["scheduler"] = scheduler_class.from_config(settings)
    if len(described.text_encoders) == 2:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
