"""The file of a LoRA: whether it fits a denoiser, from the shapes in its header, and its tensors without the header.

diffusers gives the header's settings to peft as they are. They can make peft import a module, or match names of layers
with a pattern that takes forever. So diffusers is given the tensors alone, by names that are no patterns; the scale
that a header may name is multiplied into them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rewards.networks.pretrained import shortened

FIRST, SECOND = ".lora_A.weight", ".lora_B.weight"
"""How the names of an adapter's two weights end in peft, the one that a layer's input meets first and the other."""
PREFIX = "base_model.model."
"""How names begin in files of peft's own format."""

Adapters: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""By component of a pipeline, then by name: `<layer>.lora_A.weight` `(rank, inputs, ...)` and `<layer>.lora_B.weight`
`(outputs, rank, ...)`. Their scale is 1: a layer computes `W x + B A x`."""

_INPUTS = (FIRST, ".lora.down.weight")
"""How the names of the weights end that a layer's input meets first, `(rank, inputs, ...)`."""
_SETTINGS = "lora_adapter_metadata"
"""Where the header has peft's settings, as JSON with names such as `unet.r`."""
_OUTPUTS = (SECOND, ".lora.up.weight")
DIFFUSERS_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
"""What diffusers and peft call the file in a LoRA's folder."""
_FILES = (DIFFUSERS_FILE, PEFT_FILE)
_PEFT_SETTINGS = "adapter_config.json"
_IMPLIED = (
    *("r", "target_modules", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "task_type"),
    *("init_lora_weights", "peft_version", "lora_dropout"),
)
"""Settings that the tensors say already, or that change nothing."""
_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", "none", [], {})
_KEY = re.compile(r"[\w.-]+")
_PREFIXES = ("unet.", "transformer.")


@dataclass(frozen=True)
class MergedLora:
    """A LoRA that is part of a model's frozen weights.

    Attributes:
        model: source of the model without it.
        file: the LoRA's, an absolute path.
        adapters: what was merged.
    """

    model: str
    file: str
    adapters: Adapters


def find_lora(path: str | Path, setting: str = "lora") -> Path:
    """Return the absolute path of the file of a LoRA.

    Args:
        path: the file itself, or its folder, in diffusers' or peft's layout, or with one .safetensors file.
        setting: what named it, for the message.

    Raises:
        ValueError: if there is none; for the folder of a run, which may have two.
    """
    given = Path(path).expanduser()
    if (given / "config.yaml").is_file():
        places = {"of its last iteration": given / "lora", "of its best evaluation": given / "best" / "lora"}
        named = " or ".join(f"{str(place)!r} ({which})" for which, place in places.items() if place.is_dir())
        advised = "; ddpo-sample and ddpo-evaluate take the one that the run advised with --run instead"
        raise ValueError(
            f"{setting} must not be the folder of a run but a LoRA"
            + (f" in it, {named}{advised}" if named else ", and it has none: does the run train every weight?")
            + f"; got {str(path)!r}"
        )
    found = [given / name for name in _FILES if (given / name).is_file()] or sorted(given.glob("*.safetensors"))
    file = given if given.is_file() else found[0] if len(found) == 1 else None
    if file is None or file.suffix != ".safetensors":
        raise ValueError(
            f"{setting} must be a .safetensors file, or a folder with {DIFFUSERS_FILE}; got {str(path)!r}"
            + (", a folder with several" if len(found) > 1 else "")
        )
    return Path(os.path.abspath(file))


def check_lora(file: Path, denoiser: nn.Module, model: str) -> None:
    """Refuse a LoRA that is damaged, or was trained for another model.

    Args:
        file: in safetensors.
        denoiser: of the model; it may be on the meta device.
        model: its name, for the message.

    Raises:
        ValueError: naming the file, and the layer that does not fit.
    """
    _, shapes = _header(file)
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
                f"lora {str(file)!r} was trained for another model than {model!r}: it adapts {layer} with "
                f"{tuple(shape)}, and {found}"
            )


def lora_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a LoRA, by their names in the file; a scale that the header names is part of them.

    Raises:
        ValueError: naming a file that is damaged, has names that could be patterns, or whose header has settings
            without which its tensors mean something else.
    """
    scales, _ = _header(file)
    tensors = load_file(file)
    if wrong := sorted(name for name in tensors if not _KEY.fullmatch(name)):
        raise ValueError(f"lora: {str(file)!r} must have names of letters, digits and . _ -; got {wrong[0][:80]!r}")
    for part, alpha in scales.items():
        for name in tensors:
            if name.startswith(part) and name.endswith(_OUTPUTS):
                tensors[name] = tensors[name].float() * (alpha / tensors[name].shape[1])
    return tensors


def peft_adapters(file: Path) -> dict[str, Tensor]:
    """Read a LoRA in peft's own format, in which adapters have the names of a network's layers.

    Raises:
        ValueError: for a file that is damaged, or in another format.
    """
    tensors = {name.removeprefix(PREFIX): value.float() for name, value in lora_tensors(file).items()}
    if other := sorted(name for name in tensors if not name.endswith((FIRST, SECOND))):
        raise ValueError(
            f"lora {str(file)!r} must be in peft's format, with names such as to_q{FIRST}; got {shortened(other)}"
        )
    return tensors


def _header(file: Path) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Return the scales, see `_scales`, and the shape of each tensor."""
    try:
        with safe_open(file, "pt") as content:
            text = (content.metadata() or {}).get(_SETTINGS)
            shapes = {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"lora: {str(file)!r} is no complete safetensors file: {error}") from error
    return _scales(file, text), shapes


def _scales(file: Path, text: str | None) -> dict[str, float]:
    """Return `alpha` by the beginning of the names of the tensors that it holds for, where it is not the rank.

    Raises:
        ValueError: for settings that are neither implied by the tensors nor peft's defaults.
    """
    beside = file.with_name(_PEFT_SETTINGS)
    if text is None and file.name == PEFT_FILE and beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")
    try:
        settings = json.loads(text or "{}")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"lora: {str(file)!r} has settings in its header that are no JSON object")
    ranks = {name.rpartition(".")[0]: value for name, value in settings.items() if name.rpartition(".")[2] == "r"}
    scales: dict[str, float] = {}
    if settings:
        from peft import LoraConfig

        defaults = LoraConfig().to_dict()
    followed = []
    for name, value in settings.items():
        part, _, setting = name.rpartition(".")
        if setting == "lora_alpha" and isinstance(ranks.get(part), int) and isinstance(value, int | float):
            if value != ranks[part]:
                scales[f"{part}." if part else ""] = float(value)
        elif value not in _OFF and setting not in _IMPLIED and value != defaults.get(setting):
            followed.append(f"{name}={str(value)[:40]!r}")
    if followed:
        raise ValueError(
            f"lora: {str(file)!r} has settings in its header that are not followed: {', '.join(followed[:5])}. If you "
            "trust the file, load it with diffusers, fuse it, and use the model"
        )
    return scales
