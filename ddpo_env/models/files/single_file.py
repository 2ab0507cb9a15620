"""A pipeline in one file of safetensors, in the layout of the model's authors, as model sites distribute them.

Such a file holds weights only. Configurations and tokenizers are in a folder beside it with the file's name, in
diffusers' layout: `dream.safetensors` and `dream/`. diffusers' own `from_single_file` converts the weights. What the
file does not hold, such as the text encoders of a transformer alone, is loaded from the folder.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ddpo_env.models.files.components import component_class, load_component
from ddpo_env.models.files.silence import quiet
from rewards.networks.pretrained import check_finite, shortened

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_DENOISER = "model.diffusion_model."
"""How the names of the denoiser's weights begin in files of whole pipelines."""
_LORA_KEYS = (".lora_A.", ".lora.down.", ".lora_down.", "_lora.down.")


def check_single_file(file: Path) -> None:
    """Refuse a file that is no pipeline, as far as its name and the names in its header show.

    Raises:
        ValueError: for a pickle, a LoRA, a network alone, a damaged file, or one whose folder with the configurations
            is missing; the message says what to do.
    """
    name = str(file)
    if file.suffix.lower() in _PICKLES:
        raise ValueError(
            f"model must be safetensors, not the pickle {name!r}, which can run code when it is read. If you trust "
            f"it, convert it once: diffusers.StableDiffusionPipeline.from_single_file({name!r}).save_pretrained(folder)"
        )
    weights = _outline(file)
    if any(part in key for key in weights for part in _LORA_KEYS):
        raise ValueError(
            f"model must be a pipeline, and {name!r} is a LoRA. Pass the model that it was trained for, and the file "
            f"as the LoRA to start from: lora={name!r}"
        )
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    likely, unknown = (fetch_diffusers_config(one)["pretrained_model_name_or_path"] for one in (weights, {}))
    if likely == unknown and not any(key.startswith(_DENOISER) for key in weights):
        raise ValueError(
            f"model {name!r} must hold a whole pipeline in its authors' layout, with weights such as {_DENOISER}*; it "
            f"has {shortened(sorted(weights))}. If it is one network of a pipeline, load it into that pipeline with "
            "diffusers, and write the pipeline to a folder: pipe.save_pretrained(folder)"
        )
    folder = configuration_of(file)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model {name!r} holds weights only; its configurations and tokenizers must be in the folder "
            f"{str(folder)!r}, and there is no model_index.json. Get those of {likely}, or of the model that it was "
            f"trained from, once: {download_of_configurations(likely, '--local-dir', str(folder))}"
        )


def download_of_configurations(name: str, *options: str) -> str:
    """Return the command that gets the configurations and tokenizers of a model on the Hub, without its weights."""
    patterns = [part for kind in ("json", "txt", "model") for part in ("--include", f"*.{kind}")]
    return shlex.join(["hf", "download", name, *patterns, *options])


def configuration_of(file: Path) -> Path:
    """Return the folder with the configurations of a single file: the file's name without its ending."""
    return file.with_suffix("")


def load_single_file(
    file: str, location: str, class_name: str, components: Mapping[str, Any], settings: Mapping[str, Any], dtype: Any
) -> DiffusionPipeline:
    """Load the pipeline of a single file.

    Args:
        file: with the weights.
        location: folder with the configurations.
        class_name: of the pipeline.
        components: `[library, class]` by name.
        settings: all other arguments of the pipeline's class.
        dtype: of the weights.

    Raises:
        ValueError: for a pipeline without such files, or weights that are missing, do not fit or are not finite.
    """
    pipeline_class: Any = getattr(diffusers, class_name)
    if not hasattr(pipeline_class, "from_single_file"):
        raise ValueError(f"model {file!r} must be a folder in diffusers' layout, as a {class_name} has no single files")
    in_folder = {
        name: load_component(location, name, place, dtype)
        for name, place in components.items()
        if not issubclass(component_class(location, name, place), nn.Module)
        or any((Path(location) / name).glob("*.safetensors"))
    }
    try:
        with quiet():  # it warns of weights that a file holds beside the pipeline, and without reason
            pipeline: DiffusionPipeline = pipeline_class.from_single_file(
                file, config=location, torch_dtype=dtype, local_files_only=True, **settings, **in_folder
            )
    except Exception as error:  # of many kinds, as the file is anybody's
        raise ValueError(
            f"model {file!r} must hold the weights of a {class_name} that the configurations in {location!r} describe, "
            f"as far as they are not there; {type(error).__name__}: {error}"
        ) from error
    for name in components.keys() - in_folder.keys():
        network = getattr(pipeline, name)
        missing = [key for key, value in network.state_dict().items() if value.device.type == "meta"]
        if missing:
            raise ValueError(
                f"model {file!r} must hold every weight of the {name} that {location!r} describes; {len(missing)} "
                f"missing: {shortened(sorted(missing))}"
            )
        check_finite(network, f"{name} of model {file!r}")
    return pipeline


def _outline(file: Path) -> dict[str, Tensor]:
    """Return the weights of a file by name, on the meta device: only the header is read."""
    try:
        with safe_open(file, "pt") as content:
            shapes = {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"model must be a folder in diffusers' layout or a file of safetensors; {str(file)!r} is none: {error}"
        ) from error
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
