"""A denoiser whose linear layers hold their frozen weights in 8 or 4 bits; LoRA adapters on top learn in float32.

diffusers and torchao quantize a layer as soon as its file is read. Only weights are quantized: a layer computes with
them in the model's dtype, so a row's output does not depend on the other rows of its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, get_args

import torch
from diffusers import ModelMixin, TorchAoConfig
from torch import nn

from ddpo_env.validation.choices import Quantization
from rewards.networks.pretrained import stored_tensors

_TENSORS: dict[str, Quantization] = {"Int8Tensor": "int8", "NF4Tensor": "nf4"}
"""torchao's class of quantized weights → what it is called here."""
_NF4_BLOCK = 64
_NF4_SCALES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Valid numbers of scales that are quantized together; the first that divides a layer's number of blocks is used."""


def check_quantization(quantization: Any) -> None:
    """Refuse a quantization that there is not.

    Raises:
        ValueError: for another name.
        ImportError: if torchao is not installed.
    """
    if quantization is None:
        return
    if quantization not in get_args(Quantization):
        raise ValueError(
            f"quantization must be None or one of {', '.join(get_args(Quantization))}; got {quantization!r}"
        )
    if find_spec("torchao") is None:
        raise ImportError(
            f"quantization={quantization!r} needs the package 'torchao': pip install \"ddpo-env[quantization]\""
        )


def diffusers_config(quantization: Quantization) -> TorchAoConfig:
    """Return the `quantization_config` for diffusers' `from_pretrained`."""
    return TorchAoConfig(_torchao_config(quantization))


def quantize_network(network: nn.Module, quantization: Quantization, source: str) -> None:
    """Quantize the linear layers of a network in place, as `from_pretrained` with `diffusers_config` does.

    Args:
        network: of diffusers; on the meta device only the shapes change.
        quantization: of its weights.
        source: of the model, for the message.

    Raises:
        ValueError: for a network of another library, or without linear layers.
    """
    from torchao.quantization import quantize_

    if isinstance(network, ModelMixin):
        kept = _kept_in_float32(network)

        def is_quantized(layer: nn.Module, name: str) -> bool:
            return isinstance(layer, nn.Linear) and not any(one in f"{name}.weight".split(".") for one in kept)

        quantize_(network, _torchao_config(quantization), is_quantized)
    check_quantized(network, quantization, source)


def check_quantized(network: nn.Module, quantization: Quantization | None, source: str) -> None:
    """Refuse a network whose weights are not quantized as they should be; `None` takes each way that is known here.

    Raises:
        ValueError: naming the quantization and the model.
    """
    found = quantization_of(network)
    if found not in (None, *get_args(Quantization)):
        raise ValueError(
            f"model {source!r} must have weights without quantization, or torchao's int8 or nf4; those of its "
            f"{type(network).__name__} are {found}. Load it by its folder, with quantization='nf4'"
        )
    if quantization is None or found == quantization:
        return
    what = f"is quantized as {found}" if found else "stays as it is: only a diffusers network that is loaded can change"
    raise ValueError(
        f"quantization must be {found!r} with model {source!r}, whose {type(network).__name__} {what}; "
        f"got {quantization!r}"
    )


def quantization_of(network: nn.Module) -> str | None:
    """Return how the weights of a network are quantized; `None` if they are not.

    That is a `Quantization`, or the class of a weight that another library or another setting quantized.
    """
    for weight in network.parameters():
        kind = type(weight).__name__
        if kind in _TENSORS:
            return _TENSORS[kind]
        if not weight.is_floating_point() or len(stored_tensors(weight)) > 1:
            return kind
    return None


def stored_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's weights as they are stored, scales of quantized ones included."""
    return sum(part.nbytes for weight in network.parameters() for part in stored_tensors(weight))


def cast_outline(network: nn.Module, dtype: torch.dtype) -> None:
    """Give a network on the meta device the dtypes that it has once it is loaded in a dtype."""
    for weight in castable_weights(network):
        weight.data = weight.data.to(dtype)


def loaded_dtype(network: nn.Module) -> torch.dtype:
    """Return the dtype that a network was loaded in, which its inputs have too."""
    return next(castable_weights(network)).dtype


def castable_weights(network: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of a network without those that diffusers keeps in float32, whatever dtype is asked for."""
    kept = _kept_in_float32(network)
    for name, weight in network.named_parameters():
        if not any(one in name.split(".") for one in kept):
            yield weight


def _kept_in_float32(network: nn.Module) -> tuple[str, ...]:
    """Return parts of the names of weights that diffusers loads in float32, whatever dtype is asked for."""
    return tuple(network._keep_in_fp32_modules or ()) if isinstance(network, ModelMixin) else ()


def _torchao_config(quantization: Quantization) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if quantization == "int8" else _nf4_config()()


@cache
def _nf4_config() -> type[Any]:
    """Return a configuration of torchao with which it quantizes a linear layer to its `NF4Tensor`."""
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import NF4Tensor
    from torchao.quantization.transform_module import register_quantize_module_handler

    @dataclass
    class NF4WeightOnlyConfig(AOBaseConfig):
        block_size: int = _NF4_BLOCK

    @register_quantize_module_handler(NF4WeightOnlyConfig)
    def quantize(layer: nn.Module, config: NF4WeightOnlyConfig) -> nn.Module:
        """Quantize a layer whose number of weights is a multiple of the block; leave another one as it is."""
        weight: Any = layer.weight
        blocks, rest = divmod(weight.numel(), config.block_size)
        if rest == 0:
            scales = next(number for number in _NF4_SCALES if blocks % number == 0)
            quantized = NF4Tensor.from_tensor(weight, config.block_size, scales)
            layer.weight = nn.Parameter(quantized, requires_grad=False)
        return layer

    return NF4WeightOnlyConfig
