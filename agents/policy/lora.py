"""What of the denoiser learns: low-rank adapters (LoRA, by peft) or every weight.

The denoiser is shared by everybody who loaded the model, so neither way touches it. Adapters go into a copy of the
module tree that holds the *same* frozen tensors; full fine-tuning works on a copy of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from agents.policy.frozen_convolutions import forget_inputs

ADAPTER = "default"
"""Name of the one adapter in peft."""

LoraTargets = Literal["attention", "attention+convolutions"]

_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # of the text, in SD 3's and FLUX's joint attention
)
_CONVOLUTIONS = ("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+convolutions": _ATTENTION + _CONVOLUTIONS,
}
"""Layers that get an adapter, by the end of their name in diffusers' denoisers."""

_Module = TypeVar("_Module", bound=nn.Module)


def share_weights(module: _Module) -> _Module:
    """Copy a module tree without copying its tensors: layers can be replaced in the copy, the weights stay one."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def add_lora(denoiser: _Module, rank: int, targets: LoraTargets) -> _Module:
    """Return the denoiser with fresh trainable float32 adapters around the shared frozen weights.

    Args:
        denoiser: the model's network; it is not changed.
        rank: of the adapters; their scale `alpha / rank` is 1. They start as the identity.
        targets: a name in `LORA_TARGETS`.

    Raises:
        ValueError: for a rank below 1, unknown targets, or a denoiser that carries adapters already.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1 (0 trains every weight); got {rank}")
    if targets not in LORA_TARGETS:
        raise ValueError(f"lora_targets must be one of {', '.join(LORA_TARGETS)}; got {targets!r}")
    if getattr(denoiser, "peft_config", None):
        raise ValueError(
            "model already carries a LoRA, which would be saved apart from the new one: "
            "merge it first with pipe.fuse_lora() and pipe.unload_lora_weights()"
        )
    names = [name for name, _ in denoiser.named_modules()]
    if not any(name == target or name.endswith(f".{target}") for name in names for target in LORA_TARGETS[targets]):
        raise ValueError(
            f"lora_targets={targets!r} names no layer of this {type(denoiser).__name__}: "
            "train every weight with lora_rank=0"
        )
    adapted = share_weights(denoiser)
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS[targets])
    )
    inject_adapter_in_model(config, adapted, ADAPTER)
    forget_inputs(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return adapted


def copy_for_full_training(denoiser: _Module) -> _Module:
    """Return a float32 copy of the denoiser in which every weight learns."""
    trained = copy.deepcopy(denoiser).requires_grad_(True)
    for tensor in (*trained.parameters(), *trained.buffers()):
        if tensor.is_floating_point():  # one by one: diffusers' own `to` warns where there is nothing to warn of
            tensor.data = tensor.data.to(torch.float32)
    return trained


@contextmanager
def merged_adapters(denoiser: nn.Module) -> Iterator[None]:
    """Compute with `W + B A` as each adapted layer's weight, inside: a sampling call then costs no more than without LoRA.

    The sum is a tensor of its own, so `W`, which the pretrained model shares, stays as it is. Inside, what learns may
    not change, and no gradient reaches it. In half precision the sum rounds a small adapter away.
    """
    layers: list[Any] = [layer for layer in denoiser.modules() if isinstance(layer, LoraLayer)]
    frozen = [layer.base_layer.weight for layer in layers]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, frozen, strict=True):
                merged = (weight.float() + layer.get_delta_weight(ADAPTER).float()).to(weight.dtype)
                layer.base_layer.weight = nn.Parameter(merged, requires_grad=False)
                layer.enable_adapters(False)
        yield
    finally:
        for layer, weight in zip(layers, frozen, strict=True):
            layer.base_layer.weight = weight
            layer.enable_adapters(True)
