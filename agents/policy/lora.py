"""The weights that learn: low-rank adapters (LoRA, by peft) or every weight of the denoiser.

The environment and the policy share the model, so neither way changes its denoiser. Adapters go into a copy of the
module tree that holds the *same* frozen tensors; full training works on a copy of its own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from agents.policy.frozen_convolutions import use_frozen_convolutions
from agents.policy.options import LoraTargets
from ddpo_env.models import DiffusionModel, abilities_of
from ddpo_env.models.files.pipelines import unwrapped
from ddpo_env.models.lora.lora_file import FIRST, find_lora, lora_tensors

ADAPTER = "default"
"""Name of the one adapter in peft."""
POLICY_WEIGHTS = "policy.safetensors"
"""File in which a policy saves what learns."""

_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # text tokens in the joint attention of SD 3 and FLUX
)
_CONVOLUTIONS = ("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+convolutions": _ATTENTION + _CONVOLUTIONS,
}
"""Layers that get an adapter, by the last part of their name in diffusers' denoisers."""

_Module = TypeVar("_Module", bound=nn.Module)


def share_weights(module: _Module) -> _Module:
    """Copy a module tree without its tensors: layers can be replaced in the copy, and the weights are shared."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def has_layers(denoiser: nn.Module, targets: LoraTargets) -> bool:
    """Return whether a denoiser has a layer that targets match."""
    names = [name for name, _ in denoiser.named_modules()]
    return any(name == target or name.endswith(f".{target}") for name in names for target in LORA_TARGETS[targets])


def add_lora(denoiser: _Module, rank: int, targets: LoraTargets) -> _Module:
    """Return the denoiser with fresh trainable float32 adapters around the shared frozen weights.

    Args:
        denoiser: the model's network; it is not changed. If it is wrapped, as by `torch.compile`, the network inside
            is used.
        rank: rank of the adapters. Their scale `alpha / rank` is 1. At the start they do not change the output.
        targets: a name in `LORA_TARGETS`.

    Raises:
        ValueError: for a rank below 1, unknown targets, or a denoiser that has adapters already.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1 (0 trains every weight); got {rank}")
    if targets not in LORA_TARGETS:
        raise ValueError(f"lora_targets must be one of {', '.join(LORA_TARGETS)}; got {targets!r}")
    _check_plain(denoiser)
    if not has_layers(denoiser, targets):
        raise ValueError(
            f"lora_targets={targets!r} matches no layer of this {type(denoiser).__name__}: "
            "train every weight with lora_rank=0"
        )
    adapted = share_weights(unwrapped(denoiser))
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS[targets])
    )
    _inject(config, adapted)
    return adapted


def continue_lora(denoiser: _Module, adapters: Mapping[str, Tensor]) -> _Module:
    """Return the denoiser with trainable float32 adapters that go on from given ones, around the shared frozen weights.

    Args:
        denoiser: the model's network; it is not changed.
        adapters: as `ModelAbilities.lora_adapters` returns them; layers and ranks are theirs, and the scale is 1.

    Raises:
        ValueError: for adapters of layers that the denoiser does not have, or a denoiser that has adapters already.
    """
    _check_plain(denoiser)
    adapted = share_weights(unwrapped(denoiser))
    ranks = {name.removesuffix(FIRST): len(value) for name, value in adapters.items() if name.endswith(FIRST)}
    rank = max(ranks.values(), default=0)
    others = {f"^{layer}": one for layer, one in ranks.items() if one != rank}
    try:
        config = LoraConfig(
            r=rank, lora_alpha=rank, rank_pattern=others, alpha_pattern=others, target_modules=list(ranks)
        )
        _inject(config, adapted, dict(adapters))
        result = set_peft_model_state_dict(adapted, dict(adapters), ADAPTER)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"lora must have adapters for this {type(denoiser).__name__}: {error}") from error
    left_out = [name for name in result.missing_keys if ".lora_" in name]
    if result.unexpected_keys or left_out:
        raise ValueError(
            f"lora must have both halves of adapters for layers of this {type(denoiser).__name__}; unexpected "
            f"{result.unexpected_keys[:3]}, missing {left_out[:3]}"
        )
    return adapted


def starting_adapters(model: DiffusionModel, path: str | Path) -> Mapping[str, Tensor]:
    """Return the adapters of a LoRA that training goes on from; see `ModelAbilities.lora_adapters`.

    Args:
        model: that the LoRA is for; it may be on the meta device.
        path: file or folder; also a folder that `DiffusionPolicy.save` wrote.

    Raises:
        ValueError: for a file that is not there, is damaged, or is for another model.
    """
    file = find_lora(path)
    if file.name != POLICY_WEIGHTS:
        return abilities_of(model).lora_adapters(file)
    learned = {name.removeprefix("denoiser."): value for name, value in lora_tensors(file).items()}
    return {name.replace(f".{ADAPTER}.", "."): value for name, value in learned.items() if ".lora_" in name}


def _check_plain(denoiser: nn.Module) -> None:
    if getattr(denoiser, "peft_config", None):
        raise ValueError(
            "model already has a LoRA, and the new one would be saved without it: merge it first with "
            "pipe.fuse_lora() and pipe.unload_lora_weights()"
        )


def _inject(config: LoraConfig, adapted: nn.Module, weights: dict[str, Tensor] | None = None) -> None:
    """Add adapters that are trainable in float32; the layers around them keep less for the backward pass."""
    with warnings.catch_warnings():  # of merging by peft, which is not used: see `merged_adapters`
        warnings.filterwarnings("ignore", ".*was instantiated without `get_apply_tensor_subclass`")
        inject_adapter_in_model(config, adapted, ADAPTER, state_dict=weights)
    use_frozen_convolutions(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def copy_for_full_training(denoiser: _Module) -> _Module:
    """Return a float32 copy of the denoiser in which every weight learns."""
    trained = copy.deepcopy(unwrapped(denoiser)).requires_grad_(True)
    for tensor in (*trained.parameters(), *trained.buffers()):
        if tensor.is_floating_point():  # one by one, because diffusers' own `to` warns without reason
            tensor.data = tensor.data.to(torch.float32)
    return trained


@contextmanager
def merged_adapters(denoiser: nn.Module) -> Iterator[None]:
    """Use `W + B A` as the weight of each adapted layer inside this context: a call costs no more than without LoRA.

    The sum is a new tensor, so `W`, which the pretrained model shares, does not change. Inside, the adapters must not
    change, and no gradient reaches them. In half precision the sum loses small adapters to rounding.

    Inside and afterwards, `requires_grad` of the adapters is what it was: a policy that a callback saves during a
    rollout is complete. peft's `enable_adapters` would change it.
    """
    layers: list[Any] = [layer for layer in denoiser.modules() if isinstance(layer, LoraLayer)]
    frozen = [layer.base_layer.weight for layer in layers]
    learns = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}

    def switch(layer: Any, enabled: bool) -> None:
        layer.enable_adapters(enabled)
        for parameter in layer.parameters():
            parameter.requires_grad_(learns.get(parameter, False))

    try:
        with torch.no_grad():
            for layer, weight in zip(layers, frozen, strict=True):
                merged = (weight.float() + layer.get_delta_weight(ADAPTER).float()).to(weight.dtype)
                layer.base_layer.weight = nn.Parameter(merged, requires_grad=False)
                switch(layer, False)
        yield
    finally:
        for layer, weight in zip(layers, frozen, strict=True):
            layer.base_layer.weight = weight
            switch(layer, True)
