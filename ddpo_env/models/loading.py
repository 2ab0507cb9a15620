"""Loading of a diffusion model, once per process, and what the rest of the package asks of it.

Second stop of the data's path: a prompt becomes conditioning here, and a final latent becomes a picture. The
environment uses `encode_prompts` and `decode`; the policy uses `denoiser` and `predict`. Both hold the same object, so
the weights are in memory once. Each family of pipelines is one file that implements `DiffusionModel`, and one line in
`FAMILIES`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable
from weakref import WeakValueDictionary

import diffusers
import torch
from diffusers import DiffusionPipeline
from gymnasium.envs.registration import EnvSpec
from torch import Tensor, nn

from ddpo_env.models.pipelines import load_pipeline, pipeline_index, place_pipeline, refuse_pickles
from rewards.devices import DTYPES, resolve_device, resolve_dtype

BUNDLED_MODELS: dict[str, str] = {
    "tiny": "data/tiny",
    "points": "ddpo_env.models.families.points:PointsModel",
    "sd14-random": "ddpo_env.models.families.stable_diffusion_1_4:random_stable_diffusion_1_4",
}
"""Models that need no download: name → folder below `ddpo_env`, or `module:function` called with device and dtype."""

FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "ddpo_env.models.families.stable_diffusion:StableDiffusionModel",
    "StableDiffusionXLPipeline": "ddpo_env.models.families.stable_diffusion_xl:StableDiffusionXLModel",
    "StableDiffusion3Pipeline": "ddpo_env.models.families.stable_diffusion_3:StableDiffusion3Model",
    "FluxPipeline": "ddpo_env.models.families.flux:FluxModel",
    "DDPMPipeline": "ddpo_env.models.families.ddpm:DDPMModel",
}
"""diffusers pipeline class → the adapter of its family, `module:Class` called with the pipeline and its source."""

Conditioning: TypeAlias = Mapping[str, Tensor]
"""Conditioning tensors by their diffusers names, each `(batch, ...)`."""

_IMPORTED_BY = os.getpid()
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_loaded: dict[tuple[str, str, str], DiffusionModel] = {}
_resized: dict[tuple[int, str, str, str], DiffusionModel] = {}
_pipelines: WeakValueDictionary[str, DiffusionPipeline] = WeakValueDictionary()
_models: WeakValueDictionary[str, DiffusionModel] = WeakValueDictionary()


@runtime_checkable
class DiffusionModel(Protocol):
    """What a family of diffusion models must offer; everything else in the package is written against this.

    An object of any class with these members is a model that `load_model` takes: a denoiser of your own. More are
    optional:

    * `draws_pictures = False`: `decode` returns something else than uint8 pictures.
    * `render(latents)` draws latents `(batch, *latent_shape)` as uint8 pictures `(batch, height, width, 3)` where
      `decode` does not, or not well.
    * `negative_conditioning()`: what guidance leads away from, each tensor `(1, ...)`; default: the empty prompt's.
    * `guidance_embeds = True`: the denoiser takes the guidance scale as an input and is called once a step;
      `predict` then finds it in `conditioning["guidance"]`, `(batch,)`.
    * `sampler_options(num_inference_steps)`: keywords for `GaussianSampler.from_scheduler`, such as `sigmas`, `mu`.
    * `loading_options`, of a family's class: keywords for its pipeline's `from_pretrained`.
    * `prepare_prompts(prompts)`: encode prompts of which the environment knows that they are going to come.
    * `save_memory(offload_text_encoder, vae_tiling)`, as `load_model` has them; both may be `None`.
    * `resolution`: side of the pictures in pixels if it is not the pipeline's own, else `None`. The class of a model
      that has this attribute is called with `pipeline`, `source` and `resolution` for another one.
    """

    source: str
    """What `load_model` was given, as a string that finds this model again in this process."""
    latent_shape: tuple[int, ...]
    """Shape of one latent, without the batch."""
    conditioning_shapes: dict[str, tuple[int, ...]]
    """Shape of each conditioning tensor for one prompt, by its diffusers name."""
    scheduler: Any
    """The pipeline's diffusers scheduler; `GaussianSampler.from_scheduler` reads its configuration."""
    denoiser: nn.Module
    """The network that is trained. The model itself never changes its weights."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return float32 conditioning `(batch, *conditioning_shapes[name])` on the model's device."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents `(batch, *latent_shape)` into uint8 pictures `(batch, height, width, 3)`.

        A model that draws something else returns that, `(batch, ...)` in a dtype that NumPy has.
        """
        ...

    def predict(self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Call `denoiser` on latents `(batch, ...)` at timesteps `(batch,)`; return its output, latent-shaped."""
        ...

    def save_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Write the adapters of `denoiser` such that the pipeline's own `load_lora_weights(folder)` reads them."""
        ...


def resolve_source(model: str | Path) -> str:
    """Turn a bundled name, folder or Hub id into what is loaded, without loading anything.

    Raises:
        ValueError: for a name that is neither, or a folder that holds no pipeline.
    """
    name = str(model)
    if name in BUNDLED_MODELS:
        if ":" in BUNDLED_MODELS[name]:
            return name
        return str(files("ddpo_env") / BUNDLED_MODELS[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"model folder {name!r} holds no diffusers pipeline: it has no model_index.json")
        return str(folder.resolve())
    looks_like_path = name.startswith((".", "/", "~")) or isinstance(model, Path)
    if _HUB_ID.fullmatch(name) and not looks_like_path and not name.startswith("pipeline/"):
        return name
    if name.startswith("pipeline/"):
        raise ValueError(
            f"model {name!r} stands for a pipeline object that is gone or of another process; pass it again"
        )
    raise ValueError(f"model must be {_valid_models()}; got {name!r}")


def check_source(model: str | Path) -> None:
    """Refuse a model that cannot be loaded, as far as its name, or the files of its folder but for the weights, tell.

    Nothing is loaded or downloaded.

    Raises:
        ValueError: as `load_model`, for a name, a folder, its pipeline's family, or weights that are pickled.
    """
    if str(model) in _models or str(model) in _pipelines:
        return
    location = resolve_source(model)
    if location not in BUNDLED_MODELS and Path(location).is_dir():
        _family_in(location)


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
        dtype: of the frozen weights: `"auto"`, `"float32"`, `"float16"`, `"bfloat16"` or the torch dtype.
        resolution: side of the pictures in pixels, for text-to-image pipelines; default: the pipeline's own. The
            adapters of two resolutions share the weights.
        offload_text_encoder: whether the text encoders are on an accelerator only while they encode. Each distinct
            prompt is encoded once. Default: yes; on a CPU there is no effect.
        vae_tiling: whether pictures are decoded one at a time, and those that are larger than the VAE's own size in
            tiles that overlap and are blended: less memory, and pictures that differ a little. Default: no.

    What is not said of the last two stays as it is in a model that is loaded already.

    Returns:
        The model's adapter. The same arguments give the same object.

    Raises:
        ValueError: unknown model, device, dtype or pipeline family; a resolution, or a way to save memory, that the
            model cannot have; a folder whose weights are pickled.
        OSError: a Hub id that cannot be downloaded, or has no safetensors weights.
    """
    if os.getpid() != _IMPORTED_BY:
        torch.set_num_threads(1)  # a forked process has OpenMP's state without its threads, and would wait for them
    loaded = _load(model, device, dtype)
    if resolution not in (None, getattr(loaded, "resolution", None)):
        loaded = at_resolution(loaded, resolution)
    _save_memory(loaded, offload_text_encoder, vae_tiling)
    return loaded


def _load(
    model: str | Path | DiffusionPipeline | DiffusionModel, device: str | torch.device, dtype: str | torch.dtype
) -> DiffusionModel:
    if isinstance(model, str) and model in _models:
        model = _models[model]
    if isinstance(model, DiffusionModel):
        return _own_model(model, device, dtype)
    resolved_device = resolve_device(device)
    resolved_dtype = resolve_dtype(dtype, resolved_device)
    if isinstance(model, DiffusionPipeline):
        source = f"pipeline/{id(model):x}"
        _pipelines[source] = model
    elif isinstance(model, str | Path):
        source = str(model)
    else:
        lacks = [name for name in _MEMBERS if not hasattr(model, name)]
        without = f" without {', '.join(lacks)}" if len(lacks) < len(_MEMBERS) else ""
        raise ValueError(f"model must be {_valid_models()}; got a {type(model).__name__}{without}")
    pipeline = _pipelines.get(source)
    location = resolve_source(model) if pipeline is None else source
    key = (location, str(resolved_device), str(resolved_dtype))
    cached = _loaded.get(key)
    if pipeline is None:
        if cached is not None:
            return cached
        if location in BUNDLED_MODELS:
            _loaded[key] = bundled_model(location, resolved_device, resolved_dtype)
            return _loaded[key]
        family, options = _family_in(location)
        pipeline = load_pipeline(location, resolved_dtype, options).to(resolved_device)
    else:
        family = family_of(type(pipeline).__name__)
        place_pipeline(pipeline, resolved_device, resolved_dtype)
        if cached is not None and getattr(cached, "pipeline", None) is pipeline:
            return cached
    _loaded[key] = family(pipeline, source)
    return _loaded[key]


def _save_memory(model: DiffusionModel, offload_text_encoder: bool | None, vae_tiling: bool | None) -> None:
    if hasattr(model, "save_memory"):
        model.save_memory(offload_text_encoder, vae_tiling)
        return
    for name, value, part in (
        ("offload_text_encoder", offload_text_encoder, "text encoder to move"),
        ("vae_tiling", vae_tiling, "VAE with tiles"),
    ):
        if value:
            raise ValueError(f"{name} must be False with model {model.source!r}, which has no {part}; got {value!r}")


def at_resolution(model: Any, resolution: int) -> DiffusionModel:
    """Return the adapter of a loaded model's pipeline for another resolution: the weights are the same."""
    if not hasattr(model, "resolution"):
        raise ValueError(
            f"resolution must be None with model {model.source!r}, which has only its own; got {resolution!r}"
        )
    weight = next(model.denoiser.parameters())
    key = (id(model.pipeline), str(weight.device), str(weight.dtype), str(resolution))
    if key not in _resized:
        _resized[key] = type(model)(model.pipeline, model.source, resolution)
    return _resized[key]


def with_model_named(spec: EnvSpec | None, model: DiffusionModel) -> EnvSpec | None:
    """Return the spec with a model object's name in its place: wrappers copy the spec with all that it holds."""
    if spec is None or not isinstance(spec.kwargs.get("model"), DiffusionPipeline | DiffusionModel):
        return spec
    return replace(spec, kwargs={**spec.kwargs, "model": model.source})


def unload_models() -> None:
    """Forget every loaded model, so that its memory can be freed once nobody else holds it."""
    _loaded.clear()
    _resized.clear()


def _valid_models() -> str:
    return (
        f"a bundled name ({', '.join(BUNDLED_MODELS)}), a folder that exists, a Hub id such as "
        "'CompVis/stable-diffusion-v1-4', a diffusers pipeline, or a DiffusionModel (by its source while it exists)"
    )


_MEMBERS = tuple(name for name in (*DiffusionModel.__annotations__, *vars(DiffusionModel)) if not name.startswith("_"))


def _own_model(model: DiffusionModel, device: str | torch.device, dtype: str | torch.dtype) -> DiffusionModel:
    """Check a user's model, and remember it by its source."""
    source = model.source
    is_known = _models.get(source) is model or any(model is one for one in (*_loaded.values(), *_resized.values()))
    if not is_known:
        if not isinstance(source, str) or not source or source in BUNDLED_MODELS or source.startswith("pipeline/"):
            raise ValueError(
                f"source of a model must be a name of its own, not one of {', '.join(BUNDLED_MODELS)}; got {source!r}"
            )
        if source in _models:
            raise ValueError(f"source of a model must be its own; another model of this process has {source!r}")
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
    if not is_known:
        _models[source] = model
    return model


def _family_in(location: str) -> tuple[Any, dict[str, Any]]:
    """Return the adapter's class for the pipeline in a folder or on the Hub, and keywords for its `from_pretrained`."""
    index = pipeline_index(location)
    family = family_of(index["_class_name"])
    absent = {name: None for name, where in index.items() if where == [None, None]}
    options = absent | getattr(family, "loading_options", {})
    refuse_pickles(Path(location), [name for name in index if name not in options])
    return family, options


def bundled_model(name: str, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
    """Build a bundled model that a function makes, see `BUNDLED_MODELS`."""
    module, function = BUNDLED_MODELS[name].split(":")
    with _without_torchvision_warnings():
        build: Callable[..., DiffusionModel] = getattr(import_module(module), function)
    return build(device=device, dtype=dtype)


def family_of(pipeline_class: str) -> Any:
    """Return the adapter of a diffusers pipeline class.

    Raises:
        ValueError: for a class that has none.
    """
    if pipeline_class not in FAMILIES:
        raise ValueError(f"model must be one of the pipelines {', '.join(FAMILIES)}; got a {pipeline_class}")
    module, name = FAMILIES[pipeline_class].split(":")
    with _without_torchvision_warnings():
        getattr(diffusers, pipeline_class)
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
