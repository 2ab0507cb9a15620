"""A model's shapes without its weights, on torch's meta device: what it costs is known before it is loaded."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ddpo_env.models.loading import (
    BUNDLED_MODELS,
    DiffusionModel,
    at_resolution,
    bundled_model,
    family_of,
    resolve_source,
)

_KNOWN: dict[str, str] = {
    "CompVis/stable-diffusion-v1-4": "sd14-random",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd14-random",
}
"""Hub ids of pipelines whose architecture is a bundled model's."""
_NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that no picture passes in text-to-image; old folders name classes that are no more."""


def outline_model(model: str | Path, resolution: int | None = None) -> DiffusionModel | None:
    """Return a model on the meta device: it computes shapes, and no numbers. Nothing is downloaded.

    Args:
        model: bundled name, folder in diffusers' layout, or Hub id.
        resolution: side of the pictures in pixels; default: the model's own.

    Returns:
        The model; `None` for a Hub id whose architecture is not known here.

    Raises:
        ValueError: for a name that is neither, a folder that holds no pipeline, or one of an unknown family; for a
            resolution that the model cannot have.
    """
    outlined = _outline(resolve_source(model))
    return outlined if outlined is None or resolution is None else at_resolution(outlined, resolution)


def _outline(source: str) -> DiffusionModel | None:
    source = _KNOWN.get(source, source)
    meta = torch.device("meta")
    if source in BUNDLED_MODELS:
        return bundled_model(source, meta, torch.float32)
    if not Path(source).is_dir():
        return None
    index = DiffusionPipeline.load_config(source)
    family = family_of(index["_class_name"])
    parts: dict[str, Any] = {name: None for name in _NOT_NEEDED if name in index}
    parts |= getattr(family, "loading_options", {})
    with meta:
        for name, place in index.items():
            if isinstance(place, list) and name not in parts:
                parts[name] = _outline_part(Path(source) / name, *place)
    pipeline = getattr(diffusers, index["_class_name"])(**parts)
    outlined: DiffusionModel = family(pipeline, source)
    return outlined


def _outline_part(folder: Path, library: str | None, class_name: str | None) -> Any:
    """Build a network from its configuration; load what has no weights, such as a tokenizer."""
    if library is None or class_name is None:
        return None
    part = getattr(import_module(library), class_name)
    if not issubclass(part, nn.Module):
        with torch.device("cpu"):
            return part.from_pretrained(folder)
    if library == "diffusers":
        return part.from_config(part.load_config(folder))
    return part(part.config_class.from_pretrained(folder))
