"""A model's shapes without its weights, on torch's meta device: what it costs is known before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import recursively_apply
from torch import nn
from torch._subclasses import FakeTensorMode

from ddpo_env.models.files.components import component_class, reading
from ddpo_env.models.protocol import DiffusionModel, ShapeUnknownError, abilities_of
from ddpo_env.models.sources import BUNDLED_MODELS, adapted, build_bundled, family_in, resolve_source
from ddpo_env.validation.resolution import Resolution, plain_resolution

_KNOWN: dict[str, str] = {
    "CompVis/stable-diffusion-v1-4": "sd14-random",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd14-random",
}
"""Hub ids of pipelines whose architecture is that of a bundled model."""


def outline_model(
    model: str | Path, resolution: Resolution | None = None, pipeline_arguments: Mapping[str, Any] | None = None
) -> DiffusionModel | None:
    """Return a model on the meta device: it computes shapes, and no numbers. Nothing is downloaded.

    Args:
        model: bundled name, folder in diffusers' layout, single file, or Hub id.
        resolution: of the images in pixels, `512` or `"832x1216"` (width x height); default: the model's own.
        pipeline_arguments: of every call of the pipeline, see `load_model`.

    Returns:
        The model; `None` for a Hub id whose architecture is not known here, or a pipeline whose shapes depend on what
        its networks compute.

    Raises:
        ValueError: for a name that is none of these, a folder that holds no pipeline, an unknown family, a component of
            another library than diffusers and transformers, or a resolution that the model cannot have.
    """
    resolution, pipeline_arguments = plain_resolution(resolution), dict(pipeline_arguments or {})
    outlined = _outline(resolve_source(model), pipeline_arguments)
    if outlined is not None and pipeline_arguments != abilities_of(outlined).arguments:
        outlined = abilities_of(outlined).with_arguments(pipeline_arguments)
    return outlined if outlined is None or resolution is None else abilities_of(outlined).at_resolution(resolution)


def _outline(source: str, arguments: Mapping[str, Any]) -> DiffusionModel | None:
    source = _KNOWN.get(source, source)
    if source in BUNDLED_MODELS:
        return build_bundled(source, torch.device("meta"), torch.float32)
    if not Path(source).exists():
        return None
    family, index = family_in(source, with_weights=False)
    with torch.device("meta"):
        pipeline = index.assemble(partial(_outline_component, index.location))
        try:
            return adapted(family, pipeline, source, arguments)
        except ShapeUnknownError:  # the pipeline reads lengths from its tokenizer's masks
            pass
        try:
            with _inputs_on_the_host(pipeline):
                return adapted(family, pipeline, source, arguments)
        except ShapeUnknownError:
            return None


@contextmanager
def _inputs_on_the_host(pipeline: Any) -> Iterator[None]:
    """Let a pipeline of the meta device work on the CPU inside this context: its networks return zeros there."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    on_the_host = ModelHook()
    on_the_host.execution_device = "cpu"  # where the pipeline then makes its tensors
    for network in networks:
        network.forward = partial(_zeros_as_from, network.forward)
        add_hook_to_module(network, on_the_host)
    try:
        with torch.device("cpu"):
            yield
    finally:
        for network in networks:
            remove_hook_from_module(network)
            del network.forward


def _zeros_as_from(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return zeros of the shapes that a network on the meta device returns; inputs and zeros are on the CPU.

    Networks ask their inputs whether any token is masked. transformers leaves that out for fake tensors.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args, kwargs = recursively_apply(lambda one: mode.from_tensor(one.to("meta")), (args, kwargs))
        output = forward(*args, **kwargs)
    return recursively_apply(lambda one: torch.zeros(one.shape, dtype=one.dtype), output)


def _outline_component(source: str, name: str, place: Any) -> Any:
    """Build a network from its configuration; load what has no weights, such as a tokenizer."""
    folder = Path(source) / name
    component: Any = component_class(source, name, place)
    with reading(source, name):
        if not issubclass(component, nn.Module):
            with torch.device("cpu"):
                return component.from_pretrained(folder)
        if place[0] == "diffusers":
            return component.from_config(component.load_config(folder))
        return component(component.config_class.from_pretrained(folder))
