"""Loads one component of a pipeline's folder: its class, its configuration and its weights are checked first.

A folder is data that somebody else may have written. Only classes of diffusers and transformers of the kind that the
component needs are looked up, only safetensors are read, and no weight may be missing: diffusers and transformers would
leave it random and say so in a log.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn
from transformers import ImageProcessingMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import FeatureExtractionMixin

from ddpo_env.models.quantization import diffusers_config
from ddpo_env.validation.choices import Quantization
from rewards.networks.pretrained import check_network, check_settings, shortened

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_KINDS: dict[str, tuple[type[Any], ...]] = {
    "scheduler": (SchedulerMixin,),
    "tokenizer": (PreTrainedTokenizerBase,),
    "feature_extractor": (FeatureExtractionMixin, ImageProcessingMixin),
}
"""Base classes of a component by the beginning of its name; every other component is a network."""
_NETWORKS = (ModelMixin, PreTrainedModel)
_MOST_STEPS = 1_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERSION = "If you trust the file, load the pipeline with diffusers and write it again: pipe.save_pretrained(folder)"


def component_class(location: str, name: str, place: Any) -> type[Any]:
    """Return the class of diffusers or transformers that an index names for a component; nothing else is looked up.

    Args:
        location: folder or Hub id, for the message.
        name: of the component, which says what kind of class it must be.
        place: what the index says: `[library, class]`.

    Raises:
        ValueError: for another library, a name that is no class of it, or a class of another kind.
    """
    library, class_name = place if isinstance(place, list) and len(place) == 2 else (place, None)
    if not isinstance(library, str) or library not in _LIBRARIES:
        raise ValueError(
            f"component {name} of model {location!r} must be a class of {' or '.join(_LIBRARIES)}; its "
            f"model_index.json names the library {library!r}, which is not imported"
        )
    kinds = next((bases for start, bases in _KINDS.items() if name.startswith(start)), _NETWORKS)
    found = None
    if isinstance(class_name, str) and class_name.isidentifier() and class_name[0].isupper():
        found = getattr(_LIBRARIES[library], class_name, None)
    if not isinstance(found, type) or not found.__module__.startswith(f"{library}.") or not issubclass(found, kinds):
        valid = " or ".join(base.__name__ for base in kinds)
        raise ValueError(
            f"component {name} of model {location!r} must be a class of {library}; its model_index.json or "
            f"configuration names {class_name!r}, and the installed {library} has no {valid} of that name"
        )
    return found


def check_component(location: str, name: str, place: Any, with_weights: bool = True) -> None:
    """Check a component's class, and in a folder its configuration and the names of its weights; load nothing.

    Args:
        location: folder or Hub id.
        name: of the component.
        place: what the index says: `[library, class]`.
        with_weights: whether there must be weights in a folder.

    Raises:
        ValueError: naming the component, and what is missing or not valid.
    """
    component = component_class(location, name, place)
    folder = Path(location) / name
    if not Path(location).is_dir():
        return
    if not folder.is_dir():
        raise ValueError(f"model folder {location!r} must hold the component {name}; it has no folder of that name")
    for file in folder.glob("*config.json"):
        _check_configuration(location, name, file)
    if with_weights and issubclass(component, nn.Module):
        _check_weight_files(location, name, folder)


def load_component(
    location: str, name: str, place: Any, dtype: torch.dtype, quantization: Quantization | None = None
) -> Any:
    """Load a component from a pipeline's folder, and quantize its linear layers if that is asked for.

    Raises:
        ValueError: as `check_component`, or for weights that are missing, do not fit or are not finite.
    """
    check_component(location, name, place)
    component: Any = component_class(location, name, place)
    folder = Path(location) / name
    if not issubclass(component, nn.Module):
        with reading(location, name):
            return component.from_pretrained(folder)
    options: dict[str, Any] = {"dtype" if issubclass(component, PreTrainedModel) else "torch_dtype": dtype}
    if quantization is not None:
        options["quantization_config"] = diffusers_config(quantization)
    with reading(location, name):
        loaded, report = component.from_pretrained(
            folder,
            use_safetensors=True,
            output_loading_info=True,
            variant=weights_variant(location, name),
            **options,
        )
    check_network(loaded, report, f"component {name} of model {location!r}")
    return loaded


def weights_variant(location: str, name: str) -> str | None:
    """Return the variant of a component's weights, such as `fp16`, where a folder holds only that one; else `None`.

    Raises:
        ValueError: for weights in several variants, and none without.
    """
    files = [path.name.split(".") for path in (Path(location) / name).glob("*.safetensors")]
    variants = sorted({parts[1].partition("-")[0] for parts in files if len(parts) == 3})
    if not variants or any(len(parts) == 2 for parts in files):
        return None
    if len(variants) > 1:
        raise ValueError(
            f"model folder {location!r} must hold weights without a variant, or of one; {name} has "
            f"{', '.join(variants)}. Delete all but one of them"
        )
    return variants[0]


@contextmanager
def reading(location: str, name: str) -> Iterator[None]:
    """Turn whatever a library raises over the files of a component into one kind of error.

    Raises:
        ValueError: naming the component.
    """
    try:
        yield
    except Exception as error:  # the libraries raise errors of every kind for files that are damaged
        raise ValueError(
            f"component {name} of model {location!r} must fit its config.json, in files that are whole; "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_configuration(location: str, name: str, file: Path) -> None:
    """Refuse settings that lead to code or to other files; the libraries ignore `auto_map` without an Auto class."""
    if file.name == "adapter_config.json":
        raise ValueError(
            f"component {name} of model folder {location!r} must be a plain network; {file.name} names an adapter: "
            "merge it first, with pipe.fuse_lora() and pipe.unload_lora_weights() or PeftModel.merge_and_unload()"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"component {name} of model folder {location!r} has a {file.name} that is no JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"component {name} of model folder {location!r} must have an object in {file.name}")
    check_settings(config, f"component {name} of model folder {location!r}")
    steps = config.get("num_train_timesteps", 1) if name == "scheduler" else 1  # an unconditional UNet has a null there
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= _MOST_STEPS:
        raise ValueError(
            f"num_train_timesteps of component {name} of model folder {location!r} must be an integer from 1 to "
            f"{_MOST_STEPS}; got {steps!r}"
        )
    if "_class_name" in config:  # diffusers looks it up
        component_class(location, name, ["diffusers", config["_class_name"]])


def _check_weight_files(location: str, name: str, folder: Path) -> None:
    """Refuse weights that can only be read by unpickling, several variants, and an index that names other files."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    pickled = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
    if not names:
        has = f"only {pickled[0]}, a pickle, which is not loaded. {CONVERSION}" if pickled else "none"
        raise ValueError(f"model folder {location!r} must hold safetensors; {name} has {has}")
    weights_variant(location, name)
    for index in folder.glob("*.safetensors.index*.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"component {name} of model folder {location!r} has a broken {index.name}") from error
        if other := sorted(str(shard) for shard in shards if shard not in names):
            raise ValueError(
                f"component {name} of model folder {location!r} must hold the safetensors that {index.name} names; "
                f"missing {shortened(other)}"
            )
