"""Saves a LoRA in peft's own file format, for denoisers whose pipeline cannot read a LoRA, or that have no pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn


def save_peft_adapter(denoiser: nn.Module, folder: Path) -> None:
    """Write the adapter of a denoiser, such that `peft.PeftModel.from_pretrained(base_denoiser, folder)` reads it.

    Args:
        denoiser: with the adapter that `agents` put in (`peft.inject_adapter_in_model`).
        folder: gets `adapter_config.json` and `adapter_model.safetensors`, whose keys are those of a `PeftModel`.
    """
    carrier: Any = denoiser
    carrier.peft_config["default"].save_pretrained(folder)
    weights = get_peft_model_state_dict(denoiser)
    named = {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
