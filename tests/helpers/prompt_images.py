"""Prompts with images, as a user has them: a JSON Lines file beside a folder of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from helpers.micro_families import LEVELS, SCHEDULE, stable_diffusion_2
from helpers.micro_pipeline import HIDDEN
from helpers.more_families import CASES

KONTEXT = {name: value for name, value in CASES["flux_kontext"].arguments.items() if name != "image"}
"""Arguments of the tiny FLUX.1 Kontext without the one image for all prompts."""


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise of a size (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    """The encoded image is in four more channels of the UNet's input."""
    unet = UNet2DConditionModel(**LEVELS, in_channels=8, attention_head_dim=[2, 4], cross_attention_dim=HIDDEN)
    return StableDiffusionInstructPix2PixPipeline(**_parts(unet), requires_safety_checker=False)


def controlnet() -> StableDiffusionControlNetPipeline:
    """A second network reads the image, and nothing encodes it before."""
    unet = UNet2DConditionModel(**LEVELS, attention_head_dim=[2, 4], cross_attention_dim=HIDDEN)
    reader = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 16))
    with torch.no_grad():
        for weight in reader.parameters():  # its last layers are zero at first
            weight.normal_(std=0.2, generator=torch.Generator().manual_seed(weight.numel()))
    return StableDiffusionControlNetPipeline(**_parts(unet), controlnet=reader, requires_safety_checker=False)


def _parts(unet: UNet2DConditionModel) -> dict[str, Any]:
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    return {**stable_diffusion_2().components, "unet": unet, "scheduler": scheduler}


def prompt_file(folder: Path, prompts: list[tuple[str, int]], **fields: Any) -> Path:
    """Write `edits.jsonl`: each prompt with the picture of its seed, and with further fields."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for text, seed in prompts:
        picture(seed).save(folder / "pictures" / f"{seed}.png")
        lines.append(json.dumps({"prompt": text, "image": f"pictures/{seed}.png", **fields}))
    path = folder / "edits.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def likeness(samples: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """A reward: how close a sample is to the image of its prompt."""
    given = np.stack([np.asarray(Image.open(one["image"])) for one in metadata])
    return np.asarray(-np.abs(samples.astype(float) - given).mean((1, 2, 3)))
