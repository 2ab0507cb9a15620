"""Loads a diffusion model once per process, the second stop of the data's path.

Environment and policy both ask `load_model` and get the same object, so the weights are in memory once. What a name
stands for is in `sources`; how a pipeline's files are read is in `pipelines`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, finalize

import torch
from diffusers import DiffusionPipeline
from gymnasium.envs.registration import EnvSpec
from torch import nn

from ddpo_env.models.families.watching import WatchedPipeline
from ddpo_env.models.files.pipelines import (
    DENOISERS,
    download_pipeline,
    file_fingerprint,
    load_pipeline,
    place_pipeline,
    snapshot,
    weights_fingerprint,
)
from ddpo_env.models.lora.adapters import merge_lora
from ddpo_env.models.lora.lora_file import MergedLora, find_lora
from ddpo_env.models.outline import outline_model
from ddpo_env.models.protocol import MEMBERS, DiffusionModel, ModelAbilities, abilities_of
from ddpo_env.models.quantization import (
    castable_weights,
    check_quantization,
    check_quantized,
    loaded_dtype,
    quantization_of,
    quantize_network,
)
from ddpo_env.models.sources import (
    BUNDLED_MODELS,
    PIPELINE_OBJECT,
    VALID_MODELS,
    adapted,
    build_bundled,
    family_in,
    family_of,
    resolve_source,
)
from ddpo_env.sampler.gaussian_sampler import GaussianSampler
from ddpo_env.validation.choices import Quantization
from ddpo_env.validation.resolution import Resolution, plain_resolution
from rewards.networks.devices import DTYPES, resolve_device, resolve_dtype

_IMPORTED_BY = os.getpid()
_OBJECT = "object that is not saved"
_loaded: dict[tuple[str | None, ...], DiffusionModel] = {}
"""Models that were loaded, by location, device, dtype and quantization, and the LoRA that is merged."""
_changed: WeakValueDictionary[tuple[int, str], DiffusionModel] = WeakValueDictionary()
"""Changed models, by the identity of the original, which the changed one keeps alive, and what was changed."""
_adapted: WeakValueDictionary[tuple[Any, ...], DiffusionModel] = WeakValueDictionary()
"""Models of pipeline objects by source, device, dtype and the identities of the components, which the model holds."""
_made: WeakValueDictionary[int, DiffusionModel] = WeakValueDictionary()
"""Every model that was made here, by its identity."""
_objects: WeakValueDictionary[str, DiffusionPipeline | DiffusionModel] = WeakValueDictionary()
"""What `load_model` was given as an object, by its source; and models with a LoRA that was merged."""
_pipeline_sources: WeakKeyDictionary[DiffusionPipeline, str] = WeakKeyDictionary()
_pipeline_numbers = count(1)


def check_source(
    model: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    resolution: Resolution | None = None,
    num_inference_steps: int | None = None,
    pipeline_arguments: Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Refuse a model that cannot be loaded, as far as its name and its folder show, apart from the weights.

    Nothing is loaded or downloaded. The arguments are those of `load_model` and of the environment.

    Raises:
        ImportError: if the package is missing that the quantization needs.
        ValueError: as `load_model`, for a device, a dtype, a name, a folder, the family of its pipeline, a component
            that is missing or not valid, or weights that are pickled; for a resolution that the model cannot have, or
            for more steps than its scheduler has.
    """
    resolve_dtype(dtype, resolve_device(device))
    check_quantization(quantization)
    if is_object(model):
        return
    location = resolve_source(model)
    if resolution is not None or num_inference_steps is not None or pipeline_arguments or quantization:
        outlined = outline_model(model, resolution, pipeline_arguments)
        if outlined is not None and num_inference_steps is not None:
            GaussianSampler.from_model(outlined, num_inference_steps)
        if outlined is not None and quantization is not None:
            quantize_network(outlined.denoiser, quantization, str(model))
    if location not in BUNDLED_MODELS and Path(location).exists():
        family_in(location)


def is_object(model: str | Path) -> bool:
    """Return whether a name stands for a model or a pipeline object of this process."""
    return str(model) in _objects


def find_object(model: Any) -> Any:
    """Return the model or the pipeline object of this process that a name stands for, or what was given."""
    return _objects.get(model, model) if isinstance(model, str) else model


def load_model(
    model: str | Path | DiffusionPipeline | DiffusionModel,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    resolution: Resolution | None = None,
    pipeline_arguments: Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
    *,
    base_lora: str | Path | None = None,
    offload_text_encoder: bool | None = None,
    vae_tiling: bool | None = None,
) -> DiffusionModel:
    """Load a diffusion model, or return the one that this process has loaded already.

    Args:
        model: bundled name (`"tiny"`, `"points"`), folder in diffusers' layout, a single `.safetensors` file with its
            configurations in a folder of the same name beside it, Hub id, a pipeline object (which is
            moved to `device` and `dtype`; the model has the components that it has now, and holds them), or a
            `DiffusionModel` of your own, which stays where it is and is found again by its `source` as long as somebody
            holds it.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        dtype: dtype of the frozen weights: `"auto"`, `"float32"`, `"float16"`, `"bfloat16"` or the torch dtype.
        resolution: of the images in pixels: `512`, or `"832x1216"` for width x height; default: the pipeline's own.
            Models of the same pipeline with different resolutions share the weights.
        pipeline_arguments: arguments of every call of the pipeline, such as `{"num_frames": 17}` or `{"height": 832,
            "width": 1216}`. Default: the pipeline's own.
        quantization: of the frozen denoiser's linear layers: `"int8"`, or `"nf4"` (4 bits). A pipeline object must have
            been loaded with it. Default: none.
        base_lora: file or folder of a LoRA that is merged into the weights, those of the text encoders too.
        offload_text_encoder: whether the text encoders are on an accelerator only while they encode. Each distinct
            prompt is encoded once. Default: yes; on a CPU there is no effect.
        vae_tiling: whether images are decoded one at a time, and those that are larger than the VAE's own size in
            tiles that overlap and are blended: this needs less memory and changes the images a little. Default: no.

    If the model is loaded already and one of the last two is not given, it stays as it is.

    Returns:
        The model. The same arguments give the same object.

    Raises:
        ValueError: for an unknown model, device, dtype or pipeline family; for a resolution, or a way to save memory,
            that the model cannot have; for a folder whose components or weights are missing, pickled, not finite or of
            another part; for a model of your own that has abilities and does not derive from `ModelAbilities`; for a
            LoRA that does not fit, or for a model that is an object or is not read from files.
        ImportError: if the package is missing that the quantization needs.
        OSError: for a Hub id that cannot be downloaded, or has no safetensors weights.
    """
    check_quantization(quantization)
    resolution = plain_resolution(resolution)
    if os.getpid() != _IMPORTED_BY:
        torch.set_num_threads(1)  # a forked process has OpenMP's state without its threads, and would wait for them
    model = find_object(model)
    loaded = _load(model, device, dtype, pipeline_arguments or {}, quantization, base_lora)
    check_quantized(loaded.denoiser, quantization, loaded.source)
    if pipeline_arguments is not None or not isinstance(model, DiffusionModel):
        wanted = _with_objects(pipeline_arguments or {}, loaded)
        if wanted != abilities_of(loaded).arguments:
            loaded = _change(loaded, repr(wanted), lambda one: one.with_arguments(wanted))
    if resolution is not None and resolution != abilities_of(loaded).resolution:
        loaded = _change(loaded, repr(resolution), lambda one: one.at_resolution(resolution))
    abilities_of(loaded).save_memory(offload_text_encoder, vae_tiling)
    abilities_of(loaded).check_outputs()
    return loaded


def unload_models() -> None:
    """Drop every model that was loaded by name, so that its memory can be freed once nobody else holds it.

    Environments, policies and spaces keep their models. The next `load_model` of a name loads it anew.
    """
    _loaded.clear()
    _changed.clear()


def _change(model: DiffusionModel, change: str, apply: Callable[[ModelAbilities], DiffusionModel]) -> DiffusionModel:
    """Return a model with the same weights that differs in one thing, the same one each time."""
    changed = _changed.get((id(model), change))
    if changed is None:
        abilities = abilities_of(model)
        changed = _made_here(apply(abilities), abilities.identity, abilities.merged_lora)
        _changed[id(model), change] = changed
        _keep_alive(model, changed)
    return changed


def _with_objects(arguments: Mapping[str, Any], model: DiffusionModel) -> dict[str, Any]:
    """Return arguments with the model's own objects in place of what `plain_arguments` wrote for them."""
    own = abilities_of(model).arguments
    missing = [name for name, value in arguments.items() if isinstance(value, dict) and _OBJECT in value]
    if absent := [name for name in missing if name not in own]:
        raise ValueError(
            f"model must be an object whose pipeline_arguments have {', '.join(absent)}, which no file holds; "
            f"got {model.source!r}"
        )
    return {**arguments, **{name: own[name] for name in missing}}


def plain_arguments(model: DiffusionModel) -> dict[str, Any]:
    """Return the arguments of a model's pipeline as JSON; in place of an object, such as an image, is its type."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value if isinstance(value, plain) else {_OBJECT: type(value).__name__}
        for name, value in abilities_of(model).arguments.items()
    }


def with_plain_values(spec: EnvSpec | None, model: DiffusionModel) -> EnvSpec | None:
    """Return the spec with names in place of a model object, paths and enums: it is copied, and written as JSON."""
    if spec is None:
        return None
    kwargs = {
        name: str(value) if isinstance(value, Path) else value.value if isinstance(value, Enum) else value
        for name, value in spec.kwargs.items()
    }
    if isinstance(kwargs.get("model"), DiffusionPipeline | DiffusionModel):
        kwargs["model"] = model.source
    return replace(spec, kwargs=kwargs)


def _load(
    model: str | Path | DiffusionPipeline | DiffusionModel,
    device: str | torch.device,
    dtype: str | torch.dtype,
    arguments: Mapping[str, Any],
    quantization: Quantization | None,
    base_lora: str | Path | None,
) -> DiffusionModel:
    """Load a model; one that is loaded already may have other arguments."""
    if base_lora is not None and not isinstance(model, str | Path):
        raise ValueError(
            f"base_lora must be None with a model that is an object; got {str(base_lora)!r}. Merge it into the "
            "pipeline: pipe.load_lora_weights(...), pipe.fuse_lora(components=[...]), pipe.unload_lora_weights()"
        )
    if base_lora is not None and quantization is not None:
        raise ValueError(
            f"base_lora must be None with quantization={quantization!r}, because quantized weights cannot take a LoRA "
            f"in; got {str(base_lora)!r}"
        )
    if isinstance(model, DiffusionModel):
        return _register(model, device, dtype)
    place = resolve_device(device)
    weight_dtype = resolve_dtype(dtype, place)
    if isinstance(model, DiffusionPipeline):
        return _adapt(model, place, weight_dtype, arguments)
    if not isinstance(model, str | Path):
        missing = [name for name in MEMBERS if not hasattr(model, name)]
        without = f" without {', '.join(missing)}" if len(missing) < len(MEMBERS) else ""
        value = f", {model!r}" if isinstance(model, bool | int | float | bytes) else ""
        raise ValueError(f"model must be {VALID_MODELS}; got a {type(model).__name__}{without}{value}")
    location = resolve_source(model)
    lora = None if base_lora is None else find_lora(base_lora, "base_lora")
    merged = [] if lora is None else [str(lora), file_fingerprint(lora)]
    key = (location, str(place), str(weight_dtype), quantization, *merged)
    if key not in _loaded and location in BUNDLED_MODELS:
        if lora is not None:
            raise ValueError(f"base_lora must be None with model {str(model)!r}, which has no files; got {base_lora}")
        built = build_bundled(location, place, weight_dtype)
        if quantization is not None:
            quantize_network(built.denoiser, quantization, location)
        _loaded[key] = _made_here(built, None)
    elif key not in _loaded:
        family, index = family_in(location)
        if not Path(location).exists():
            family, index = family_in(download_pipeline(location, index.settings))
        source = str(model) if str(model) in BUNDLED_MODELS else location
        pipeline = load_pipeline(index, place, weight_dtype, quantization)
        identity = index.fingerprint()
        if lora is None:
            _loaded[key] = _made_here(adapted(family, pipeline, source, arguments), identity)
        else:
            added = merge_lora(pipeline, WatchedPipeline(pipeline, source).denoiser_name, lora, source)
            own = adapted(family, pipeline, f"{source} with {lora}", arguments)
            _loaded[key] = _objects[own.source] = _made_here(own, f"{identity} {file_fingerprint(lora)}", added)
    return _loaded[key]


def _adapt(
    pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype, arguments: Mapping[str, Any]
) -> DiffusionModel:
    """Move a pipeline object, and return the model of the components that it has now."""
    family = family_of(type(pipeline).__name__)
    for name in DENOISERS:
        if isinstance(denoiser := pipeline.components.get(name), nn.Module):
            check_quantized(denoiser, None, type(pipeline).__name__)
            own = loaded_dtype(denoiser)
            if quantization_of(denoiser) and own != dtype:
                loaded, wanted = (str(one).removeprefix("torch.") for one in (own, dtype))
                raise ValueError(
                    f"dtype must be {loaded} with a quantized {type(pipeline).__name__} that was loaded in it; "
                    f"got {wanted}"
                )
    place_pipeline(pipeline, device, dtype)
    source = _pipeline_sources.setdefault(pipeline, f"{PIPELINE_OBJECT}{next(_pipeline_numbers)}")
    _objects[source] = pipeline
    key = (source, str(device), str(dtype), *map(id, pipeline.components.values()))
    model = _adapted.get(key)
    if model is None:
        model = _adapted[key] = adapted(family, snapshot(pipeline), source, arguments)
        _keep_alive(pipeline, model)  # whoever has the model finds it again by its source
    else:
        abilities_of(model).forget_prompts()  # a component may have changed in place, as by textual inversion
    return _made_here(model, weights_fingerprint(model.denoiser))


def _keep_alive(kept: object, holder: object) -> None:
    """Hold an object as long as another one lives: the arguments of a finalizer are held that long."""
    finalize(holder, id, kept).atexit = False


def _made_here(model: DiffusionModel, identity: str | None, merged: MergedLora | None = None) -> DiffusionModel:
    _made[id(model)] = model
    if isinstance(model, ModelAbilities):
        model.identity, model.merged_lora = identity, merged
    return model


def _register(model: DiffusionModel, device: str | torch.device, dtype: str | torch.dtype) -> DiffusionModel:
    """Check a model object, and remember one of the user's own by its source."""
    source = model.source
    is_known = _objects.get(source) is model or _made.get(id(model)) is model
    if not is_known:
        _check_source_is_free(source)
    places = {(weight.device, weight.dtype) for weight in castable_weights(model.denoiser)}
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
        _objects[source] = model
    return model


def _check_source_is_free(source: Any) -> None:
    """Refuse a source that does not find a user's own model."""
    if not isinstance(source, str) or not source or source in BUNDLED_MODELS or source.startswith(PIPELINE_OBJECT):
        raise ValueError(
            f"source of a model must be a name of its own, not one of {', '.join(BUNDLED_MODELS)}; got {source!r}"
        )
    if source in _objects:
        raise ValueError(f"source of a model must be its own; another model of this process has {source!r}")
