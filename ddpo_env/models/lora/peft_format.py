"""The weights of a LoRA by the names that stock diffusers and peft expect, and a check of every LoRA that was saved.

`save_peft_adapter` writes peft's own format, for denoisers whose pipeline cannot read a LoRA, or that have no pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpo_env.models.files.pipelines import unwrapped
from ddpo_env.models.lora.lora_file import PREFIX

_COMPILED = "_orig_mod."
"""What `torch.compile` puts into the names of a module inside a network."""


def adapter_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the adapters of a denoiser by their names in the network without wrappers."""
    weights = get_peft_model_state_dict(unwrapped(denoiser))
    return {name.replace(_COMPILED, ""): value.contiguous() for name, value in weights.items()}


def check_saved_adapter(file: Path, parts: Mapping[str, tuple[Mapping[str, Tensor], nn.Module]]) -> None:
    """Read a saved LoRA back: it must hold all adapters, for layers that the networks have.

    Args:
        file: what was written.
        parts: by the prefix of their keys in the file: adapters by name, and the pretrained network that is going to
            read them.

    Raises:
        ValueError: for a file that is missing or differs.
    """
    saved = load_file(file) if file.is_file() else {}
    unknown, different, count = [], [], 0
    for prefix, (weights, network) in parts.items():
        layers = {name.replace(_COMPILED, "") for name, _ in unwrapped(network).named_modules()}
        unknown += [name for name in weights if name.partition(".lora_")[0] not in layers]
        different += [name for name, value in weights.items() if not _equal(saved.pop(prefix + name, None), value)]
        count += len(weights)
    if unknown or different or saved or not count:
        raise ValueError(
            f"LoRA {str(file)!r} must hold the {count} adapters that were trained, for layers of the pretrained "
            f"network; missing or different {different[:3]}, of unknown layers {unknown[:3]}, unexpected "
            f"{sorted(saved)[:3]}"
        )


def save_peft_adapter(denoiser: nn.Module, folder: Path) -> None:
    """Write the adapter of a denoiser, such that `peft.PeftModel.from_pretrained(base_denoiser, folder)` reads it.

    Args:
        denoiser: with the adapter that `agents` put in (`peft.inject_adapter_in_model`).
        folder: gets `adapter_config.json` and `adapter_model.safetensors`, whose keys are those of a `PeftModel`.
    """
    carrier: Any = unwrapped(denoiser)
    carrier.peft_config["default"].save_pretrained(folder)
    weights, file = adapter_weights(denoiser), folder / "adapter_model.safetensors"
    save_file({PREFIX + name: value for name, value in weights.items()}, file, metadata={"format": "pt"})
    check_saved_adapter(file, {PREFIX: (weights, carrier)})


def _equal(saved: Tensor | None, value: Tensor) -> bool:
    return saved is not None and torch.equal(saved, value.detach().cpu())
