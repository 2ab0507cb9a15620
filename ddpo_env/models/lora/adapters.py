"""The adapters in a LoRA file: as diffusers itself reads them, by component of the pipeline, in float32, with scale 1.

`alpha / rank` is part of the second half of each adapter here, so a layer computes `W x + B A x`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ddpo_env.models.files.silence import quiet
from ddpo_env.models.lora.lora_file import (
    FIRST,
    PREFIX,
    SECOND,
    Adapters,
    MergedLora,
    check_lora,
    lora_tensors,
    peft_adapters,
)
from ddpo_env.models.lora.peft_format import adapter_weights, check_saved_adapter
from rewards.networks.pretrained import shortened

_NAME = "default"
_MOST_LETTERS = 300
"""Longest part of an error's text that is shown: peft's would name every layer."""


def read_adapters(pipeline: DiffusionPipeline, denoiser_name: str, file: Path, model: str) -> Adapters:
    """Read a LoRA file with the pipeline's own `load_lora_weights`: diffusers' names, kohya's and peft's.

    The pipeline is not changed. It may be on the meta device.

    Args:
        pipeline: that the LoRA is for.
        denoiser_name: of the component that learns.
        file: in safetensors.
        model: name of the pipeline, for messages.

    Raises:
        ValueError: for a file that is damaged, does not fit, or is not understood completely.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        return {denoiser_name: peft_adapters(file)}
    check_lora(file, getattr(pipeline, denoiser_name), model)
    tensors = {
        f"{denoiser_name}.{name.removeprefix(PREFIX)}" if name.startswith(PREFIX) else name: value
        for name, value in lora_tensors(file).items()
    }
    stock: Any = copy.copy(pipeline)
    networks = {
        name: _without_weights(component)
        for name in stock._lora_loadable_modules
        if isinstance(component := getattr(stock, name, None), nn.Module)
    }
    vars(stock).update(networks)
    more = {"unet_config": stock.unet.config} if "unet" in networks else {}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            converted = stock.lora_state_dict(dict(tensors), **more)
            converted = converted[0] if isinstance(converted, tuple) else converted
            stock.load_lora_weights(dict(tensors), adapter_name=_NAME)
            found = {name: _adapters_in(network) for name, network in networks.items()}
    except Exception as error:  # of many kinds, as the file is anybody's
        cause = " ".join(str(error).split())[:_MOST_LETTERS]
        raise ValueError(f"lora {str(file)!r} does not fit model {model!r}: {type(error).__name__}: {cause}") from error
    count = sum(len(adapters) for adapters in found.values())
    if not count or count != len(converted):
        raise ValueError(
            f"lora {str(file)!r} must hold low-rank adapters for layers of model {model!r}, and nothing else; "
            f"of its {len(converted)} tensors {count} are, among {shortened(sorted(converted))}"
        )
    wrong = [f"{part}.{name}" for part in found for name, value in found[part].items() if not value.isfinite().all()]
    if wrong:
        raise ValueError(f"lora {str(file)!r} must be finite; NaN or infinite values are in {shortened(wrong)}")
    return {name: adapters for name, adapters in found.items() if adapters}


def denoiser_adapters(pipeline: DiffusionPipeline, denoiser_name: str, file: Path, model: str) -> Mapping[str, Tensor]:
    """Return the adapters of the denoiser, from a LoRA that adapts nothing else; see `read_adapters`.

    Raises:
        ValueError: also for a LoRA that adapts a text encoder: it is not trained, and what is saved would lack it.
    """
    found = read_adapters(pipeline, denoiser_name, file, model)
    if others := sorted(found.keys() - {denoiser_name}):
        raise ValueError(
            f"lora must adapt the {denoiser_name} alone, the only part that is trained; {str(file)!r} also adapts "
            f"{', '.join(others)}. Merge it into the model instead, and train a new LoRA: base_lora={str(file)!r}"
        )
    return found[denoiser_name]


def check_mergeable(pipeline: Any, denoiser_name: str, file: Path, model: str) -> Adapters:
    """Return the adapters of a LoRA that can be merged into a pipeline.

    Raises:
        ValueError: as `read_adapters`, or for a pipeline that reads no LoRA.
    """
    if not hasattr(pipeline, "fuse_lora"):
        raise ValueError(
            f"base_lora must be None with model {model!r}, whose {type(pipeline).__name__} reads no LoRA; "
            f"got {str(file)!r}"
        )
    return read_adapters(pipeline, denoiser_name, file, model)


def merge_lora(pipeline: Any, denoiser_name: str, file: Path, model: str) -> MergedLora:
    """Add a LoRA to the weights of a pipeline, with diffusers' own `fuse_lora`.

    Raises:
        ValueError: as `check_mergeable`.
    """
    adapters = check_mergeable(pipeline, denoiser_name, file, model)
    with quiet():
        pipeline.load_lora_weights(
            {
                f"{part}.{name}": value.to(getattr(pipeline, part).device)
                for part, weights in adapters.items()
                for name, value in weights.items()
            }
        )
        pipeline.fuse_lora(components=list(adapters))
        pipeline.unload_lora_weights()
    return MergedLora(model, str(file), adapters)


def save_adapters(
    pipeline: Any, denoiser_name: str, denoiser: nn.Module, merged: MergedLora | None, folder: Path
) -> None:
    """Write the adapters of a denoiser, together with what was merged before, with the pipeline's `save_lora_weights`.

    The file has peft's own key names: with diffusers' old ones, stock `load_lora_weights` loses the attention half of a
    LoRA on attention and convolutions. The scale `alpha / rank` is 1, which diffusers assumes if a file does not name
    it.
    """
    parts: Adapters = {denoiser_name: adapter_weights(denoiser)}
    if merged is not None:
        parts = combined(merged.adapters, parts)
    pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": dict(weights) for part, weights in parts.items()})
    networks = {f"{part}.": (weights, getattr(pipeline, part)) for part, weights in parts.items()}
    check_saved_adapter(folder / LORA_WEIGHT_NAME_SAFE, networks)


def combined(first: Adapters, second: Adapters) -> Adapters:
    """Return adapters that do what two do together: `B₁ A₁ + B₂ A₂ = [B₁ B₂] [A₁; A₂]`, exactly."""
    parts: dict[str, dict[str, Tensor]] = {part: dict(weights) for part, weights in first.items()}
    for part, weights in second.items():
        own = parts.setdefault(part, {})
        for name, value in weights.items():
            value, axis = value.detach().cpu().float(), 0 if name.endswith(FIRST) else 1
            own[name] = torch.cat([own[name].cpu(), value], axis) if name in own else value
    return parts


def _without_weights(network: nn.Module) -> nn.Module:
    """Return a copy on the CPU in float32 whose weights take no memory: it carries adapters."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        zeros = torch.zeros((), dtype=dtype, device="cpu").expand(tensor.shape)
        memo[id(tensor)] = nn.Parameter(zeros, False) if isinstance(tensor, nn.Parameter) else zeros
    return copy.deepcopy(network, memo)


def _adapters_in(network: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not isinstance(layer, LoraLayer) or layer.lora_embedding_A or any(layer.use_dora.values()):
            raise ValueError(f"layer {name} has an adapter of another kind than LoRA")
        ((adapter, scale),) = layer.scaling.items()
        found[name + FIRST] = layer.lora_A[adapter].weight.detach()
        found[name + SECOND] = layer.lora_B[adapter].weight.detach() * scale
    return found
