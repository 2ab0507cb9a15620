"""What the name of a model stands for: a bundled model, a folder or a Hub id, and the family of its pipeline.

Only the code of an adapter and the index of a pipeline are loaded here.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch

from ddpo_env.models.families.pipeline_model import PipelineModel
from ddpo_env.models.families.watching import check_form
from ddpo_env.models.files.pipelines import PipelineIndex, read_index
from ddpo_env.models.files.single_file import check_single_file, configuration_of
from ddpo_env.models.protocol import DiffusionModel
from rewards.networks.pretrained import HUB_ID
from rewards.registry import did_you_mean

BUNDLED_MODELS: dict[str, str] = {
    "tiny": "data/tiny",
    "points": "ddpo_env.models.families.points:PointsModel",
    "sd14-random": "data/architectures/sd14.json",
}
"""Models that need no download: name → a pipeline's folder below `ddpo_env`, a `module:function` that is called with
device and dtype, or an architecture that gets random weights (`ddpo_env.models.random_pipelines`)."""

ADAPTERS: dict[str, str] = {"DDPMPipeline": "ddpo_env.models.families.ddpm:DDPMModel"}
"""diffusers pipeline class → the adapter, `module:Class`, called with the pipeline and its source. Every other pipeline
is watched: `ddpo_env.models.families.pipeline_model`."""

VALID_MODELS = (
    f"a bundled name ({', '.join(BUNDLED_MODELS)}), a folder or a .safetensors file that exists, a Hub id such as "
    "'CompVis/stable-diffusion-v1-4', a diffusers pipeline, or a DiffusionModel (by its source while it exists)"
)
"""What `load_model` takes, for messages."""

PIPELINE_OBJECT = "pipeline/"
"""How the source of a pipeline object begins."""


def resolve_source(model: str | Path) -> str:
    """Turn a bundled name, folder, single file or Hub id into what is loaded, without loading anything.

    Raises:
        ValueError: for a name that is none of these, or a folder or a file without a pipeline.
    """
    name = str(model)
    if name in BUNDLED_MODELS:
        bundled = files("ddpo_env") / BUNDLED_MODELS[name]
        return str(bundled) if bundled.is_dir() else name
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"model folder {name!r} holds no diffusers pipeline: it has no model_index.json")
        return str(folder.resolve())
    if name.startswith(PIPELINE_OBJECT):
        raise ValueError(
            f"model {name!r} stands for a pipeline object that is gone or of another process; pass it again"
        )
    if folder.is_file():
        check_single_file(folder)
        return os.path.abspath(folder)  # not through a link, whose name says where the configurations are
    looks_like_path = name.startswith((".", "/", "~")) or isinstance(model, Path)
    if HUB_ID.fullmatch(name) and not looks_like_path:
        return name
    raise ValueError(f"model must be {VALID_MODELS}; got {name!r}{did_you_mean(name, BUNDLED_MODELS)}")


def build_bundled(name: str, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
    """Build a bundled model that is not a folder, see `BUNDLED_MODELS`."""
    place = BUNDLED_MODELS[name]
    if ":" in place:
        build: Callable[..., DiffusionModel] = _look_up(place)
        return build(device=device, dtype=dtype)
    build_pipeline = _look_up("ddpo_env.models.random_pipelines:build_pipeline")
    pipeline = build_pipeline(Path(place).stem, device, dtype)
    model: DiffusionModel = family_of(type(pipeline).__name__)(pipeline, name)
    return model


def family_in(location: str, with_weights: bool = True) -> tuple[Any, PipelineIndex]:
    """Return the adapter's class for a pipeline, and the checked index of the pipeline.

    Args:
        location: folder, single file or Hub id.
        with_weights: whether there must be weights in a folder.

    Raises:
        ValueError: for an unknown family, or a component that is missing or not valid, see `check_component`.
        OSError: for a Hub id that cannot be downloaded.
    """
    weights = location if Path(location).is_file() else None
    folder = str(configuration_of(Path(location))) if weights else location
    with _without_torchvision_warnings():
        index = read_index(folder, weights)
    if index.class_name not in ADAPTERS:
        check_form(getattr(diffusers, index.class_name), location)
    index.check(with_weights and weights is None)
    return family_of(index.class_name), index


def family_of(pipeline_class: str) -> Any:
    """Return the adapter of a diffusers pipeline class."""
    return _look_up(ADAPTERS[pipeline_class]) if pipeline_class in ADAPTERS else PipelineModel


def adapted(family: Any, pipeline: Any, source: str, arguments: Mapping[str, Any]) -> DiffusionModel:
    """Call a pipeline's adapter, with arguments for the pipeline's call if it takes any."""
    takes_them = arguments and "arguments" in inspect.signature(family).parameters
    model: DiffusionModel = family(pipeline, source, **{"arguments": arguments} if takes_them else {})
    return model


def _look_up(place: str) -> Any:
    """Return the attribute that `module:name` stands for."""
    module, name = place.split(":")
    with _without_torchvision_warnings():
        return getattr(import_module(module), name)


@contextmanager
def _without_torchvision_warnings() -> Iterator[None]:
    """When a pipeline's module is imported, transformers warns of a torchvision that nothing here needs."""
    logger = logging.getLogger("transformers.utils.import_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "requires torchvision (not installed)" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
