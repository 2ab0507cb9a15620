"""Loads weights in open_clip's layout, in which HPSv2 is published, into a `transformers.CLIPModel`.

The names differ. Also, open_clip keeps the three attention projections in one matrix, and its final projections are
transposed. (The names are in `open_clip/model.py` and `transformers/models/clip/modeling_clip.py`.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def convert_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of open_clip's `CLIP` to one of `transformers.CLIPModel`.

    Raises:
        ValueError: open_clip has no tensor of such a name.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        block = _BLOCK.fullmatch(name)
        if name == "attn_mask":
            continue
        if name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif block is not None and block[3].startswith("attn.in_proj_"):
            kind = block[3].removeprefix("attn.in_proj_")
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{_layer(block)}.self_attn.{letter}_proj.{kind}"] = rows.clone()
        elif block is not None and (inner := _renamed(block[3], _IN_BLOCK)):
            converted[f"{_layer(block)}.{inner}"] = tensor
        elif block is None and (renamed := _renamed(name, _NAMES)):
            converted[renamed] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"weights must be in open_clip's layout; it has no {', '.join(sorted(unknown)[:5])}")
    return converted


def clip_from_open_clip(weights: Mapping[str, Tensor], config: CLIPConfig, dtype: torch.dtype) -> CLIPModel:
    """Build the `CLIPModel` of `config` with weights in open_clip's layout.

    Raises:
        ValueError: The names or shapes of the weights differ from those of the model.
    """
    from transformers import CLIPModel

    model = CLIPModel(config)
    converted = convert_open_clip(weights)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    if own != given:
        names = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        shapes = [f"{name} (needs {own.get(name)}, got {given.get(name)})" for name in names[:5]]
        raise ValueError(f"weights do not fit the model's configuration in {len(names)} tensors: {', '.join(shapes)}")
    model.load_state_dict(converted)
    return model.to(dtype)


def _layer(block: re.Match[str]) -> str:
    return f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """Return the new name of a tensor, which may be the `weight` or `bias` of a module in `names`; None if unknown."""
    if name in names:
        return names[name]
    module, _, kind = name.rpartition(".")
    return f"{names[module]}.{kind}" if module in names and kind in ("weight", "bias") else None
