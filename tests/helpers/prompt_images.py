"""Prompts with images, as a user has them: a JSON Lines file beside a folder of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from helpers.more_families import CASES

KONTEXT = {name: value for name, value in CASES["flux_kontext"].arguments.items() if name != "image"}
"""Arguments of the tiny FLUX.1 Kontext without the one image for all prompts."""


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise of a size (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


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
