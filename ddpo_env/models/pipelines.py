"""Reads a diffusers pipeline: its index first, classes of diffusers and transformers only, and safetensors only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Names of the components that may be on another device than the rest: they move when there is something to encode."""

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERSION = "If you trust the file, load the pipeline with diffusers and write it again: pipe.save_pretrained(folder)"


def pipeline_index(location: str) -> Mapping[str, Any]:
    """Read the index of a pipeline in a folder or on the Hub, with its class and its components.

    Raises:
        ValueError: for a folder that holds no pipeline.
        OSError: for a Hub id that cannot be downloaded.
    """
    try:
        config = DiffusionPipeline.load_config(location)
    except OSError as error:
        if Path(location).is_dir():
            raise ValueError(f"model folder {location!r} holds no diffusers pipeline: {error}") from error
        raise _download_error(location, error) from error
    if not isinstance(config, Mapping) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"model {location!r} holds no diffusers pipeline: its model_index.json names no _class_name")
    return config


def check_libraries(location: str, components: Mapping[str, Any]) -> None:
    """Refuse components of any library but diffusers and transformers: importing another one would run its code.

    Args:
        location: folder or Hub id, for the message.
        components: what the index says about the components to load: `[library, class]` by name, among other entries.

    Raises:
        ValueError: naming the component and its library.
    """
    for name, place in components.items():
        library = place[0] if isinstance(place, list) and place else None
        if library is not None and library not in _LIBRARIES:
            raise ValueError(
                f"component {name} of model {location!r} must be a class of {' or '.join(_LIBRARIES)}; its "
                f"model_index.json names the library {library!r}, which is not imported"
            )


def component_class(location: str, name: str, library: str, class_name: str) -> type[Any]:
    """Return the class of diffusers or transformers that an index names for a component.

    Raises:
        ValueError: for another library, or a class that the library does not have.
    """
    check_libraries(location, {name: [library, class_name]})
    found = getattr(_LIBRARIES[library], class_name, None)
    if not isinstance(found, type):
        raise ValueError(
            f"component {name} of model {location!r} must be a class of {library}; its model_index.json names "
            f"{class_name!r}, which the installed {library} does not have"
        )
    return found


def place_pipeline(pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype) -> None:
    """Move a pipeline whose components are not all on the device in the dtype; text encoders may be elsewhere."""
    for name, component in pipeline.components.items():
        for weight in component.parameters() if isinstance(component, nn.Module) else ():
            if weight.dtype != dtype or (weight.device != device and name not in TEXT_ENCODERS):
                pipeline.to(device=device, dtype=dtype)
                return


def refuse_pickles(folder: Path, components: Sequence[str]) -> None:
    """Refuse a folder with weights that can only be read by unpickling: a pickle can run any code.

    Raises:
        ValueError: naming the component and its file.
    """
    for name in components:
        pickled = sorted(path for kind in _PICKLES for path in (folder / name).glob(kind))
        if pickled and not any((folder / name).glob("*.safetensors")):
            raise ValueError(
                f"model folder {str(folder)!r} must hold safetensors; {name} has only {pickled[0].name}, a pickle, "
                f"which is not loaded. {_CONVERSION}"
            )


def load_pipeline(location: str, dtype: torch.dtype, options: Mapping[str, Any]) -> DiffusionPipeline:
    """Load a pipeline's safetensors from a folder or the Hub.

    Args:
        location: folder or Hub id.
        dtype: dtype of the weights.
        options: keyword arguments for `from_pretrained`.

    Raises:
        OSError: for a Hub id that cannot be downloaded, or has no safetensors weights.
    """
    if Path(location).is_dir():
        with _without_progress_bars():
            return DiffusionPipeline.from_pretrained(location, dtype=dtype, use_safetensors=True, **options)
    try:
        return DiffusionPipeline.from_pretrained(location, dtype=dtype, use_safetensors=True, **options)
    except OSError as error:
        raise _download_error(location, error) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Progress bars are for downloads; a folder is read in a moment."""
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def _download_error(location: str, error: OSError) -> OSError:
    cause = str(error).partition("\n")[0]
    if "`safetensors` weights" in cause:
        return OSError(
            f"model {location!r} has no safetensors weights on the Hub, and pickles are not loaded. {_CONVERSION}"
        )
    return OSError(
        f"model {location!r} is no folder here and could not be downloaded from the Hugging Face Hub "
        f"({cause}). Without a network, download it elsewhere (`hf download {location} --exclude '*.bin' --exclude "
        "'*.ckpt' --local-dir path/to/folder`), copy the folder here, and pass it: model='path/to/folder'"
    )
