"""The LoRA in kohya's form, which ComfyUI, AUTOMATIC1111 and other programs for Stable Diffusion read.

diffusers' `convert_state_dict_to_kohya` names the layers. Its names of text encoders are corrected, and what diffusers
reads back must be the same adapters. There is such a form only for a UNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from agents.commands.export.base_model import BaseModel
from ddpo_env.models.lora.adapters import read_adapters
from ddpo_env.models.lora.lora_file import lora_tensors

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
"""The name that diffusers' training scripts give it. diffusers reads `pytorch_lora_weights.safetensors` beside it."""

_DENOISER = "unet"
_TEXT_MODEL = "text_model_"


def write_kohya(lora: Path, file: Path, base: BaseModel) -> str | None:
    """Write a LoRA in kohya's form, and read it back.

    Args:
        lora: in diffusers' format; it fits the model.
        file: that is written.
        base: the model that the LoRA belongs to.

    Returns:
        `None`, or why there is no such form, and then no file.
    """
    pipeline = base.model.pipeline
    if base.model.watched.denoiser_name != _DENOISER:
        return f"kohya's form is for UNets, and a {base.pipeline_class} has a transformer"
    save_file(kohya_tensors(lora_tensors(lora), "text_encoder_2" in pipeline.components), file, {"format": "pt"})
    expected = read_adapters(pipeline, _DENOISER, lora, base.name)
    try:
        found = read_adapters(pipeline, _DENOISER, file, base.name)
    except ValueError as error:  # such as diffusers' own, of a text encoder in which not all projections are adapted
        found, cause = {}, str(error).replace(str(file), file.name)
    else:
        cause = "it reads other adapters"
    if found.keys() == expected.keys() and all(_equal(expected[part], found[part]) for part in found):
        return None
    file.unlink()
    return f"diffusers does not read its kohya form: {cause}"


def kohya_tensors(tensors: Mapping[str, Tensor], has_two_encoders: bool) -> dict[str, Tensor]:
    """Return the tensors of a LoRA by kohya's names, with `alpha` for every layer: it equals the rank.

    Args:
        tensors: by diffusers' names, such as `unet.<layer>.lora_A.weight`.
        has_two_encoders: whether the model has two text encoders, as SDXL: the first one is then `lora_te1`, and
            otherwise it is `lora_te`.
    """
    named: dict[str, Tensor] = {}
    for name, value in convert_state_dict_to_kohya(dict(tensors)).items():
        prefix, _, layer = name.partition("_")[2].partition("_")
        if prefix.startswith("te"):  # transformers 5 leaves `text_model` out of the names of CLIP's layers
            layer = layer if layer.startswith(_TEXT_MODEL) else _TEXT_MODEL + layer
            prefix = prefix if has_two_encoders else "te"
        # diffusers counts the rank as an integer; kohya's alpha is a number like the weights.
        value = value.to(torch.float32) if name.endswith(".alpha") else value.contiguous()
        named[f"lora_{prefix}_{layer}"] = value
    return named


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
