"""The file of a LoRA: whether it fits a denoiser, from the shapes in its header, and its tensors without the header.

diffusers gives the header's settings to peft as they are. They can make peft import a module, or match names of layers
with a pattern that takes forever. So diffusers is given the tensors alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

_INPUTS = (".lora_A.weight", ".lora.down.weight")
"""How the names of the weights end that a layer's input meets first, `(rank, inputs, ...)`."""
_SETTINGS = "lora_adapter_metadata"
"""Where the header has peft's settings, as JSON with names such as `unet.r`."""
_IMPLIED = ("r", "target_modules", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "task_type")
"""Settings that the tensors say already, or that change nothing."""
_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", "none", [], {})
_PREFIXES = ("unet.", "transformer.")


def check_lora(file: Path, denoiser: nn.Module, model: str) -> None:
    """Refuse a LoRA that is damaged, or was trained for another model.

    Args:
        file: in safetensors.
        denoiser: of the model; it may be on the meta device.
        model: its name, for the message.

    Raises:
        ValueError: naming the file, and the layer that does not fit.
    """
    try:
        with safe_open(file, "pt") as content:
            _check_scale(file, (content.metadata() or {}).get(_SETTINGS))
            shapes = {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"lora: {str(file)!r} is no complete safetensors file: {error}") from error
    if not shapes:
        raise ValueError(f"lora: {str(file)!r} holds no weights")
    layers = dict(denoiser.named_modules())
    for name, shape in shapes.items():
        prefix = next((one for one in _PREFIXES if name.startswith(one)), None)
        ending = next((one for one in _INPUTS if name.endswith(one)), None)
        if prefix is None or ending is None:
            continue  # of another part, or in another format, which diffusers converts
        layer = name.removeprefix(prefix).removesuffix(ending)
        weight = getattr(layers.get(layer), "weight", None)
        if weight is None or weight.ndim != len(shape) or weight.shape[1] != shape[1]:
            found = "there is no such layer" if weight is None else f"its weight is {tuple(weight.shape)}"
            raise ValueError(
                f"lora {str(file.parent)!r} was trained for another model than {model!r}: it adapts {layer} with "
                f"{tuple(shape)}, and {found}"
            )


def lora_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a LoRA, by their names in the file.

    Raises:
        ValueError: naming a file that is damaged, or whose header has settings without which its tensors mean something
            else, such as a scale that is not 1.
    """
    try:
        with safe_open(file, "pt") as content:
            _check_scale(file, (content.metadata() or {}).get(_SETTINGS))
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"lora: {str(file)!r} is no complete safetensors file: {error}") from error


def _check_scale(file: Path, text: str | None) -> None:
    """Refuse a header that says more than the tensors do: `alpha` must be the rank, and other settings must be off."""
    try:
        settings = json.loads(text or "{}")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"lora: {str(file)!r} has settings in its header that are no JSON object")
    ranks = {name.rpartition(".")[0]: value for name, value in settings.items() if name.rpartition(".")[2] == "r"}
    followed = []
    for name, value in settings.items():
        part, _, setting = name.rpartition(".")
        is_scale_of_1 = setting == "lora_alpha" and value == ranks.get(part)
        if value not in _OFF and setting not in _IMPLIED and not is_scale_of_1:
            followed.append(f"{name}={str(value)[:40]!r}")
    if followed:
        raise ValueError(
            f"lora: {str(file)!r} has settings in its header that are not followed: {', '.join(followed[:5])}. If you "
            "trust the file, load it with diffusers, fuse it, and use the model"
        )
