"""Weights of a tiny pipeline under the names that Stable Diffusion's authors gave them (`ldm`, `sgm`).

The rules are those of diffusers' `scripts/convert_diffusers_to_original_stable_diffusion.py` and `..._sdxl.py`, which
are in its repository and not in the package.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
UNET = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.resnets.1.": "middle_block.2.",
}
VAE = {
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}


def save_single_file(pipeline: Any, file: Path) -> None:
    """Write a pipeline as one file, and its configurations and tokenizer to the folder of the same name."""
    save_file(original_weights(pipeline), file)
    pipeline.save_pretrained(file.with_suffix(""))
    for weights in file.with_suffix("").rglob("*.safetensors"):
        weights.unlink()


def original_weights(pipeline: Any) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1 or XL pipeline by their original names."""
    found = {f"model.diffusion_model.{name}": value for name, value in _unet(pipeline.unet).items()}
    found |= {f"first_stage_model.{name}": value for name, value in _vae(pipeline.vae).items()}
    text = {
        f"transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in pipeline.text_encoder.state_dict().items()
    }
    if not hasattr(pipeline, "text_encoder_2"):
        found |= {f"cond_stage_model.{name}": value for name, value in text.items()}
    else:
        found |= {f"conditioner.embedders.0.{name}": value for name, value in text.items()}
        second = _open_clip(pipeline.text_encoder_2.state_dict())
        found |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    return {name: value.contiguous() for name, value in found.items()}


def _unet(unet: Any) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    renamed = {}
    for key, value in unet.state_dict().items():
        name = _replaced(key, UNET)
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
            way, level, kind, place = match[1], int(match[2]), match[3], int(match[4])
            number = level * (layers + 1) + place
            block = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
            name = f"{block}.{0 if kind == 'resnets' else 1}.{match[5]}"
        elif match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
            name = f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
        elif match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", name):
            level = int(match[1])
            after = 2 if "Attn" in unet.config.up_block_types[level] else 1
            name = f"output_blocks.{level * (layers + 1) + layers}.{after}.{match[2]}"
        if ".resnets." in key:
            name = _replaced(name, RESNET)
        renamed[name] = value
    return renamed


def _vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    renamed = {}
    for key, value in vae.state_dict().items():
        name = _replaced(key, VAE)
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda match: f"up.{last - int(match[1])}.block.{match[2]}.", name
        )
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda match: f"up.{last - int(match[1])}.upsample.", name)
        if ".attentions." in key and value.ndim == 2:
            value = value[:, :, None, None]  # a convolution of one pixel there
        renamed[name] = value
    return renamed


def _open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    apart = ("q_proj.", "k_proj.", "v_proj.", "text_projection.", "position_ids")
    renamed = {
        _replaced(name, OPEN_CLIP): value for name, value in weights.items() if not any(one in name for one in apart)
    }
    for layer in sorted({match[1] for name in weights if (match := re.search(r"layers\.(\d+)\.", name))}):
        for kind in ("weight", "bias"):
            start = f"text_model.encoder.layers.{layer}.self_attn."
            three = [weights[f"{start}{one}_proj.{kind}"] for one in "qkv"]
            renamed[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(three)
    renamed["text_projection"] = weights["text_projection.weight"].T
    return renamed


def _replaced(name: str, rules: dict[str, str]) -> str:
    for mine, theirs in rules.items():
        name = name.replace(mine, theirs)
    return name
