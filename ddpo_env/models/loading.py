"""Loads a diffusion model once per process, the second stop of the data's path.

Environment and policy both ask `load_model` and get the same object, so the weights are in memory once. What a name
stands for is in `sources`; how a pipeline's files are read is in `pipelines`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from diffusers import DiffusionPipeline
from gymnasium.envs.registration import EnvSpec

from ddpo_env.models.pipelines import load_pipeline, place_pipeline
from ddpo_env.models.protocol import MEMBERS, DiffusionModel, abilities_of
from ddpo_env.models.sources import (
    BUNDLED_MODELS,
    PIPELINE_OBJECT,
    VALID_MODELS,
    build_bundled,
    family_in,
    family_of,
    resolve_source,
)
from rewards.devices import DTYPES, resolve_device, resolve_dtype

_IMPORTED_BY = os.getpid()
_loaded: dict[tuple[str, str, str], DiffusionModel] = {}
"""By location, device and dtype."""
_resized: dict[tuple[int, str], tuple[DiffusionModel, DiffusionModel]] = {}
"""By the identity of a model and a resolution: that model, and the one with the other resolution."""
_pipelines: WeakValueDictionary[str, DiffusionPipeline] = WeakValueDictionary()
_models: WeakValueDictionary[str, DiffusionModel] = WeakValueDictionary()


def check_source(model: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> None:
    """Refuse a model that cannot be loaded, as far as its name and its folder show, apart from the weights.

    Nothing is loaded or downloaded. The arguments are those of `load_model`.

    Raises:
        ValueError: as `load_model`, for a device, a dtype, a name, a folder, the family of its pipeline, or weights
            that are pickled.
    """
    resolve_dtype(dtype, resolve_device(device))
    if str(model) in _models or str(model) in _pipelines:
        return
    location = resolve_source(model)
    if location not in BUNDLED_MODELS and Path(location).is_dir():
        family_in(location)


def load_model(
    model: str | Path | DiffusionPipeline | DiffusionModel,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    resolution: int | None = None,
    *,
    offload_text_encoder: bool | None = None,
    vae_tiling: bool | None = None,
) -> DiffusionModel:
    """Load a diffusion model, or return the one that this process has loaded already.

    Args:
        model: bundled name (`"tiny"`, `"points"`), folder in diffusers' layout, Hub id, a pipeline object (which is
            moved to `device` and `dtype`), or a `DiffusionModel` of your own, which stays where it is and is found
            again by its `source` as long as somebody holds it.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        dtype: dtype of the frozen weights: `"auto"`, `"float32"`, `"float16"`, `"bfloat16"` or the torch dtype.
        resolution: side of the images in pixels, for text-to-image pipelines; default: the pipeline's own. Models of
            the same pipeline with different resolutions share the weights.
        offload_text_encoder: whether the text encoders are on an accelerator only while they encode. Each distinct
            prompt is encoded once. Default: yes; on a CPU there is no effect.
        vae_tiling: whether images are decoded one at a time, and those that are larger than the VAE's own size in
            tiles that overlap and are blended: this needs less memory and changes the images a little. Default: no.

    If the model is loaded already and one of the last two is not given, it stays as it is.

    Returns:
        The model. The same arguments give the same object.

    Raises:
        ValueError: for an unknown model, device, dtype or pipeline family; for a resolution, or a way to save memory,
            that the model cannot have; for a folder whose weights are pickled; for a model of your own that has
            abilities and does not derive from `ModelAbilities`.
        OSError: for a Hub id that cannot be downloaded, or has no safetensors weights.
    """
    if os.getpid() != _IMPORTED_BY:
        torch.set_num_threads(1)  # a forked process has OpenMP's state without its threads, and would wait for them
    loaded = _load(model, device, dtype)
    abilities = abilities_of(loaded)
    if resolution is not None and resolution != abilities.resolution:
        key = (id(loaded), str(resolution))
        if key not in _resized:
            _resized[key] = loaded, abilities.at_resolution(resolution)
        loaded = _resized[key][1]
    abilities_of(loaded).save_memory(offload_text_encoder, vae_tiling)
    return loaded


def unload_models() -> None:
    """Drop every loaded model, so that its memory can be freed once nobody else holds it."""
    _loaded.clear()
    _resized.clear()


def with_model_named(spec: EnvSpec | None, model: DiffusionModel) -> EnvSpec | None:
    """Return the spec with a model object's name in its place: wrappers copy the spec with all that it holds."""
    if spec is None or not isinstance(spec.kwargs.get("model"), DiffusionPipeline | DiffusionModel):
        return spec
    return replace(spec, kwargs={**spec.kwargs, "model": model.source})


def _load(
    model: str | Path | DiffusionPipeline | DiffusionModel, device: str | torch.device, dtype: str | torch.dtype
) -> DiffusionModel:
    if isinstance(model, str):
        model = _models.get(model, _pipelines.get(model, model))
    if isinstance(model, DiffusionModel):
        return _register(model, device, dtype)
    place = resolve_device(device)
    weight_dtype = resolve_dtype(dtype, place)
    if isinstance(model, DiffusionPipeline):
        return _adapt(model, place, weight_dtype)
    if not isinstance(model, str | Path):
        missing = [name for name in MEMBERS if not hasattr(model, name)]
        without = f" without {', '.join(missing)}" if len(missing) < len(MEMBERS) else ""
        raise ValueError(f"model must be {VALID_MODELS}; got a {type(model).__name__}{without}")
    location = resolve_source(model)
    key = (location, str(place), str(weight_dtype))
    if key not in _loaded:
        if location in BUNDLED_MODELS:
            _loaded[key] = build_bundled(location, place, weight_dtype)
        else:
            family, options = family_in(location)
            _loaded[key] = family(load_pipeline(location, weight_dtype, options).to(place), str(model))
    return _loaded[key]


def _adapt(pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
    """Move a pipeline object, and return the model of it."""
    family = family_of(type(pipeline).__name__)
    source = f"{PIPELINE_OBJECT}{id(pipeline):x}"
    place_pipeline(pipeline, device, dtype)
    _pipelines[source] = pipeline
    key = (source, str(device), str(dtype))
    if key not in _loaded:
        _loaded[key] = family(pipeline, source)
    return _loaded[key]


def _register(model: DiffusionModel, device: str | torch.device, dtype: str | torch.dtype) -> DiffusionModel:
    """Check a model object, and remember one of the user's own by its source."""
    source = model.source
    ours = (*_loaded.values(), *(resized for _, resized in _resized.values()))
    is_known = _models.get(source) is model or any(model is one for one in ours)
    if not is_known:
        _check_source_is_free(source)
    places = {(weight.device, weight.dtype) for weight in model.denoiser.parameters()}
    if len(places) != 1:
        raise ValueError(f"model {source!r} must have weights on one device in one dtype; got {places or 'none'}")
    ((found_device, found_dtype),) = places
    if str(device) != "auto" and resolve_device(device) != found_device:
        raise ValueError(f"device must be auto or {found_device}, where model {source!r} is; got {str(device)!r}")
    wanted_dtype = found_dtype if str(dtype) == "auto" else resolve_dtype(dtype, found_device)
    if found_dtype not in DTYPES.values() or wanted_dtype != found_dtype:
        raise ValueError(
            f"dtype must be auto or that of model {source!r}, one of {', '.join(DTYPES)}; got {dtype!r}, and its "
            f"weights are {found_dtype}"
        )
    abilities_of(model)
    if not is_known:
        _models[source] = model
    return model


def _check_source_is_free(source: Any) -> None:
    """Refuse a source that does not find a user's own model."""
    if not isinstance(source, str) or not source or source in BUNDLED_MODELS or source.startswith(PIPELINE_OBJECT):
        raise ValueError(
            f"source of a model must be a name of its own, not one of {', '.join(BUNDLED_MODELS)}; got {source!r}"
        )
    if source in _models:
        raise ValueError(f"source of a model must be its own; another model of this process has {source!r}")
