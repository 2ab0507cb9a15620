"""LoRA files as other people's tools write them, for tiny pipelines: random, and large enough to matter."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}


def layers_of(network: nn.Module, *endings: str) -> dict[str, Any]:
    return {name: layer for name, layer in network.named_modules() if name.endswith(endings)}


def _shapes(layer: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    out, inputs, *kernel = layer.weight.shape
    return (rank, inputs, *kernel), (out, rank, *[1] * len(kernel))


ADAPTED = ("to_q", "to_out.0", "conv1", "q_proj")


def save_diffusers_lora(
    file: Path, networks: dict[str, nn.Module], rank: int = 3, endings: tuple[str, ...] = ADAPTED, **header: str
) -> Path:
    """Attention and convolutions under the names that diffusers' training scripts write, by component."""
    shapes = {}
    for part, network in networks.items():
        for name, layer in layers_of(network, *endings).items():
            first, second = _shapes(layer, rank)
            shapes |= {f"{part}.{name}.lora_A.weight": first, f"{part}.{name}.lora_B.weight": second}
    save_file(random_tensors(shapes), file, metadata={"format": "pt"} | header)
    return file


def save_kohya_lora(file: Path, unet: nn.Module, text_encoder: nn.Module | None = None) -> Path:
    """kohya's names: underscores, `alpha` for every layer, another rank and scale for convolutions."""
    shapes, alphas = {}, {}
    parts = {"lora_unet": (unet, ("to_q", "to_v", "conv1"))}
    if text_encoder is not None:
        parts["lora_te"] = (text_encoder, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1"))
    for prefix, (network, endings) in parts.items():
        for name, layer in layers_of(network, *endings).items():
            is_convolution = name.endswith("conv1")
            rank, alpha = (2, 1.0) if is_convolution else (4, 2.0)
            text = "text_model_" if prefix == "lora_te" and not name.startswith("text_model") else ""
            key = f"{prefix}_{text}{name.replace('.', '_')}"
            first, second = _shapes(layer, rank)
            shapes |= {f"{key}.lora_down.weight": first, f"{key}.lora_up.weight": second}
            alphas[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(random_tensors(shapes, seed=1) | alphas, file, metadata={"format": "pt", "ss_network_dim": "4"})
    return file
