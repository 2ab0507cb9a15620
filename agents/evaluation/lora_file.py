"""Whether the file of a LoRA fits a denoiser, from the shapes in its header: its weights are not loaded."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

_INPUTS = (".lora_A.weight", ".lora.down.weight")
"""How the names of the weights end that a layer's input meets first, `(rank, inputs, ...)`."""
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
