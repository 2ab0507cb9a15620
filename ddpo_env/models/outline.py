"""A model's shapes without its weights, on torch's meta device: what it costs is known before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ddpo_env.models.pipelines import component_class, pipeline_index
from ddpo_env.models.protocol import DiffusionModel, abilities_of
from ddpo_env.models.sources import BUNDLED_MODELS, build_bundled, family_of, loading_options, resolve_source

_KNOWN: dict[str, str] = {
    "CompVis/stable-diffusion-v1-4": "sd14-random",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd14-random",
}
"""Hub ids of pipelines whose architecture is that of a bundled model."""
_NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that text-to-image does not use; old folders name classes that no longer exist."""


def outline_model(model: str | Path, resolution: int | None = None) -> DiffusionModel | None:
    """Return a model on the meta device: it computes shapes, and no numbers. Nothing is downloaded.

    Args:
        model: bundled name, folder in diffusers' layout, or Hub id.
        resolution: side of the images in pixels; default: the model's own.

    Returns:
        The model; `None` for a Hub id whose architecture is not known here.

    Raises:
        ValueError: for a name that is none of these, a folder that holds no pipeline, an unknown family, a component of
            another library than diffusers and transformers, or a resolution that the model cannot have.
    """
    outlined = _outline(resolve_source(model))
    return outlined if outlined is None or resolution is None else abilities_of(outlined).at_resolution(resolution)


def _outline(source: str) -> DiffusionModel | None:
    source = _KNOWN.get(source, source)
    if source in BUNDLED_MODELS:
        return build_bundled(source, torch.device("meta"), torch.float32)
    if not Path(source).is_dir():
        return None
    index = pipeline_index(source)
    family = family_of(index["_class_name"])
    components: dict[str, Any] = {name: None for name in _NOT_NEEDED if name in index} | loading_options(family)
    with torch.device("meta"):
        for name, place in index.items():
            if isinstance(place, list) and name not in components:
                components[name] = _outline_component(source, name, *place)
    pipeline = getattr(diffusers, index["_class_name"])(**components)
    outlined: DiffusionModel = family(pipeline, source)
    return outlined


def _outline_component(source: str, name: str, library: str | None, class_name: str | None) -> Any:
    """Build a network from its configuration; load what has no weights, such as a tokenizer."""
    if library is None or class_name is None:
        return None
    folder = Path(source) / name
    component: Any = component_class(source, name, library, class_name)
    if not issubclass(component, nn.Module):
        with torch.device("cpu"):
            return component.from_pretrained(folder)
    if library == "diffusers":
        return component.from_config(component.load_config(folder))
    return component(component.config_class.from_pretrained(folder))
