"""Reads a diffusers pipeline: its index first, then its components one by one, checked (`components`)."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ddpo_env.models.files.components import CONVERSION, check_component, load_component
from ddpo_env.models.files.silence import without_progress_bars
from ddpo_env.models.files.single_file import load_single_file
from ddpo_env.models.protocol import DiffusionModel
from ddpo_env.models.quantization import castable_weights, quantize_network
from ddpo_env.validation.choices import Quantization
from rewards.networks.pretrained import stored_tensors

DENOISERS = ("transformer", "unet")
"""Names that a pipeline's denoiser has."""

TEXT_ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}
"""Names of the components that may be on another device than the rest: they move when there is something to encode."""

_NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that text-to-image does not use; old folders name classes that no longer exist."""
_MAY_BE_NULL = ("text_encoder_3", "tokenizer_3")
"""Stable Diffusion 3 runs without T5, though its pipeline does not call these optional."""

_WRAPPERS = (OptimizedModule, DataParallel, DistributedDataParallel)
_BLOCKS, _BLOCK = 64, 2**16
_SAMPLED_VALUES = 256


@runtime_checkable
class HasPipeline(Protocol):
    """A model around a diffusers pipeline."""

    pipeline: DiffusionPipeline


@dataclass(frozen=True)
class PipelineIndex:
    """What a folder's `model_index.json` says.

    Attributes:
        location: folder or Hub id.
        class_name: of the pipeline.
        components: `[library, class]` of what is loaded, by name.
        settings: all other arguments of the pipeline's class.
        weights: the single file that holds the weights, if they are not in the folder.
    """

    location: str
    class_name: str
    components: Mapping[str, Any]
    settings: Mapping[str, Any]
    weights: str | None = None

    def check(self, with_weights: bool = True) -> None:
        """Check every component, see `check_component`; nothing is loaded."""
        for name, place in self.components.items():
            check_component(self.location, name, place, with_weights)

    def assemble(self, build: Callable[[str, Any], Any]) -> DiffusionPipeline:
        """Return the pipeline of the components that `build(name, place)` returns."""
        pipeline_class = getattr(diffusers, self.class_name)
        expected, optional = pipeline_class._get_signature_keys(pipeline_class)
        built = {name: build(name, place) for name, place in self.components.items() if name in expected}
        settings = {name: value for name, value in self.settings.items() if name in (*expected, *optional)}
        pipeline: DiffusionPipeline = pipeline_class(**settings | built)
        return pipeline

    def fingerprint(self) -> str:
        """Return a hash of a folder's configurations and of samples of its weights: it tells two models apart."""
        digest = hashlib.sha256(repr((self.class_name, self.components, self.settings)).encode())
        for name in sorted(self.components):
            for file in sorted((Path(self.location) / name).iterdir()):
                if file.suffix in (".json", ".safetensors"):
                    digest.update(f"{name}/{file.name} {file.stat().st_size}".encode())
                    _add_samples(file, digest)
        if self.weights is not None:
            digest.update(file_fingerprint(Path(self.weights)).encode())
        return digest.hexdigest()


def read_index(location: str, weights: str | None = None) -> PipelineIndex:
    """Read and sort the index of a pipeline.

    Args:
        location: folder or Hub id.
        weights: the single file that holds the weights, if they are not in the folder.

    Raises:
        ValueError: for a folder that holds no pipeline, a pipeline that diffusers does not have, or a component that
            the index leaves out.
        OSError: for a Hub id that cannot be downloaded.
    """
    config = _configuration(location)
    name = config["_class_name"]
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, DiffusionPipeline)):
        raise ValueError(
            f"model {location!r} must be a pipeline of diffusers to be loaded by its name; its model_index.json names "
            f"{name}. Load it with its own class, and pass the object: model=pipe"
        )
    pipeline_class: Any = found
    expected, optional = pipeline_class._get_signature_keys(pipeline_class)
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    absent = {key for key, value in given.items() if value == [None, None]}
    may_be_absent = {*pipeline_class._optional_components, *_NOT_NEEDED, *(absent & {*_MAY_BE_NULL})}
    if missing := sorted(key for key in expected if key not in {*given} - absent | may_be_absent):
        raise ValueError(
            f"model {location!r} must have the component {', '.join(missing)} of a {name}; its model_index.json has "
            f"{', '.join(sorted({*given} - absent)) or 'none'}"
        )
    nothing = {key: None for key in expected if key not in given or key in absent or key in _NOT_NEEDED}
    settings = {key: value for key, value in given.items() if key in optional} | nothing
    if "requires_safety_checker" in optional:
        settings["requires_safety_checker"] = False
    components = {
        key: value for key, value in given.items() if key not in settings and key not in (*absent, *_NOT_NEEDED)
    }
    return PipelineIndex(location, name, components, settings, weights)


def _configuration(location: str) -> Mapping[str, Any]:
    """Return what the index of a pipeline says, which names its class."""
    try:
        config = DiffusionPipeline.load_config(location)
    except OSError as error:
        if Path(location).is_dir():
            raise ValueError(f"model folder {location!r} holds no diffusers pipeline: {error}") from error
        raise _download_error(location, error) from error
    if not isinstance(config, Mapping) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"model {location!r} holds no diffusers pipeline: its model_index.json names no _class_name")
    return config


def pipeline_of(model: DiffusionModel) -> DiffusionPipeline | None:
    """Return the pipeline of a model; `None` for a model that has none."""
    return model.pipeline if isinstance(model, HasPipeline) else None


def place_pipeline(pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype) -> None:
    """Move a pipeline whose components are not all on the device in the dtype; text encoders may be elsewhere."""
    for name, component in pipeline.components.items():
        for weight in castable_weights(component) if isinstance(component, nn.Module) else ():
            if weight.dtype != dtype or (weight.device != device and name not in TEXT_ENCODERS):
                pipeline.to(device=device, dtype=dtype)
                return


def snapshot(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a pipeline with the same components, without wrappers: later replacements do not reach it.

    It has no safety checker, which would replace the images that it objects to by black ones.
    """
    copied = copy.copy(pipeline)
    for name, component in pipeline.components.items():
        vars(copied)[name] = None if name == "safety_checker" else unwrapped(component)
    return copied


def unwrapped(module: Any) -> Any:
    """Return the network inside the wrappers of `torch.compile` and of data parallelism, which rename its weights."""
    while isinstance(module, _WRAPPERS):
        module = module._orig_mod if isinstance(module, OptimizedModule) else module.module
    return module


def weights_fingerprint(network: nn.Module) -> str:
    """Return a hash of the names and shapes of a network's weights, and of samples of their values in bfloat16."""
    weights = {name: value for name, value in unwrapped(network).state_dict().items() if value.is_floating_point()}
    digest = hashlib.sha256(repr({name: tuple(value.shape) for name, value in weights.items()}).encode())
    if weights:
        stored = [part for value in weights.values() for part in stored_tensors(value)]
        samples = torch.cat([value.flatten()[:_SAMPLED_VALUES].to(torch.bfloat16) for value in stored])
        digest.update(samples.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def file_fingerprint(file: Path) -> str:
    """Return a hash of the size and of samples of a weight file: the whole of a file below 4 MiB."""
    digest = hashlib.sha256(str(file.stat().st_size).encode())
    _add_samples(file, digest)
    return digest.hexdigest()


def _add_samples(file: Path, digest: Any) -> None:
    """Add parts of a file to a hash: the whole of a small file, a hundredth of a large one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
            stream.seek(start)
            digest.update(stream.read(_BLOCK))


def load_pipeline(
    index: PipelineIndex, device: torch.device, dtype: torch.dtype, quantization: Quantization | None = None
) -> DiffusionPipeline:
    """Load a pipeline's safetensors from its folder or its single file, onto a device.

    Args:
        index: of the pipeline.
        device: where its networks go.
        dtype: of their weights.
        quantization: of the denoiser's linear layers.

    Raises:
        ValueError: for a component that is missing or not valid, see `load_component`, or has non-finite weights.
    """

    def load(name: str, place: Any) -> Any:
        own = quantization if name in DENOISERS else None
        return load_component(index.location, name, place, dtype, own)

    with without_progress_bars():
        if index.weights is None:
            pipeline = index.assemble(load)
        else:
            described = index.location, index.class_name, index.components, index.settings
            pipeline = load_single_file(index.weights, *described, dtype)
            if quantization is not None:
                denoiser = next(name for name in DENOISERS if pipeline.components.get(name) is not None)
                quantize_network(pipeline.components[denoiser], quantization, str(index.weights))
    pipeline.to(device)
    return pipeline


def download_pipeline(location: str, options: Mapping[str, Any]) -> str:
    """Download a pipeline's safetensors and configurations from the Hub, and return their folder.

    Raises:
        OSError: for a Hub id that cannot be downloaded, or has no safetensors weights.
    """
    try:
        return str(DiffusionPipeline.download(location, use_safetensors=True, **options))
    except OSError as error:
        raise _download_error(location, error) from error


def _download_error(location: str, error: OSError) -> OSError:
    cause = str(error).partition("\n")[0]
    if "`safetensors` weights" in cause:
        return OSError(
            f"model {location!r} has no safetensors weights on the Hub, and pickles are not loaded. {CONVERSION}"
        )
    return OSError(
        f"model {location!r} is no folder here and could not be downloaded from the Hugging Face Hub "
        f"({cause}). Without a network, download it elsewhere (`hf download {location} --exclude '*.bin' --exclude "
        "'*.ckpt' --local-dir path/to/folder`), copy the folder here, and pass it: model='path/to/folder'"
    )
