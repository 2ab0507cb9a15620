"""Pipelines with random weights, in published architectures and in small ones: for all that weights do not matter to.

Time, memory and the numbers of weights and of floating-point operations are those of the real model; the images are
noise. The configurations are data (`ddpo_env/data/architectures`); `sd14` and `sdxl` are those that
`CompVis/stable-diffusion-v1-4` and `stabilityai/stable-diffusion-xl-base-1.0` have on the Hugging Face Hub. The
tokenizer is a stand-in that knows letters only. This file imports nothing of this package, so that
`scripts/benchmarks/random_stable_diffusion.py` can read it where the package is not installed.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_FOLDER = Path(__file__).resolve().parents[1] / "data" / "architectures"

ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    name: json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("small", "small-sdxl", "sd14", "sdxl")
}
"""Configurations by component: `unet`, `vae`, `text_encoder`, of SDXL `text_encoder_2`, and `scheduler`.

Two architectures are published, and two are small ones of the same families: latents 4 × 16 × 16, images 64 × 64. A
text encoder without a `vocab_size` has the vocabulary of `letter_tokenizer`.
"""


def letter_tokenizer(tokens: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer with one token per letter or digit, which pads and cuts to `tokens` tokens."""
    letters = [character + ending for ending in ("", "</w>") for character in string.ascii_lowercase + string.digits]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[], unk_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=tokens
    )


def build_component(architecture: str, name: str) -> Any:
    """Return `unet`, `vae`, `text_encoder` or `text_encoder_2`, with fresh weights on torch's default device."""
    settings = ARCHITECTURES[architecture][name]
    if name == "unet":
        return UNet2DConditionModel(**settings)
    if name == "vae":
        return AutoencoderKL(**settings)
    if "vocab_size" not in settings:
        tokenizer = letter_tokenizer(settings["max_position_embeddings"])
        special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        settings = settings | special | {"vocab_size": len(tokenizer)}
    return (CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel)(CLIPTextConfig(**settings))


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
        device: device of the weights.
        dtype: dtype of the weights.
        seed: seed of the weights.

    Raises:
        ValueError: for an unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}; got {architecture!r}")
    described = ARCHITECTURES[architecture]
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in described]
    with torch.random.fork_rng(range(torch.cuda.device_count())), torch.device(device), _default_dtype(dtype):
        torch.manual_seed(seed)
        components = {name: build_component(architecture, name) for name in (*encoders, "unet", "vae")}
    for name in encoders:
        tokens = described[name]["max_position_embeddings"]
        components[name.replace("text_encoder", "tokenizer")] = letter_tokenizer(tokens)
    settings = dict(described["scheduler"])
    components["scheduler"] = getattr(diffusers, settings.pop("_class_name")).from_config(settings)
    if len(encoders) == 2:
        return StableDiffusionXLPipeline(**components, add_watermarker=False)
    return StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
