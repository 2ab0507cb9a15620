"""How an adapter is applied to its layer: what peft computes, the cheaper way.

peft adds to a layer's output `W x` the output `B (A x)` of two thin layers. The same is `(W + B A) x`: in sampling
`W + B A` is computed once for a whole rollout, into a tensor of its own, so that the layer costs what it would without
an adapter and `W` stays what it was. In training it depends on the layer's width. A narrow layer's thin products cost
more than the gradient of the whole weight, and `W + B A` is computed in every call; a wide layer keeps them, with the
sum inside the product.

In half precision `W + B A` would round the adapter away, and training goes by peft's own way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

from agents.linear import linear

ADAPTER = "default"
"""The one adapter's name in peft."""


class _AdaptedLayer:
    """What `AdaptedLinear` and `AdaptedConv2d` share; the other base class is peft's layer."""

    merged_weight: Tensor | None = None
    """`W + B A` while `merged_adapters` lasts."""
    narrow_width: ClassVar[int]
    """Up to this width of input or output, training takes `W + B A`; measured on a CPU, see docs/performance.md."""

    def adapted_weight(self) -> Tensor:
        """Return `W + B A`, shaped as `W`, float32."""
        layer = cast(Any, self)
        weight = layer.base_layer.weight
        first, second = layer.lora_A[ADAPTER].weight.flatten(1), layer.lora_B[ADAPTER].weight.flatten(1)
        return torch.addmm(weight.float().flatten(1), second, first).view_as(weight)

    def weight_for(self, inputs: Tensor) -> Tensor | None:
        """Return the weight that stands for the layer with its adapter; `None` where the thin products do."""
        if self.merged_weight is not None and not torch.is_grad_enabled():
            return self.merged_weight
        is_narrow = min(cast(Any, self).base_layer.weight.shape[:2]) <= self.narrow_width
        return self.adapted_weight() if is_narrow and self.is_plain(inputs) else None

    def is_plain(self, inputs: Tensor) -> bool:
        """Whether all is float32, and the adapter is on."""
        layer, place = cast(Any, self), inputs.device.type
        autocast = torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place)
        return inputs.dtype == layer.base_layer.weight.dtype == torch.float32 and not (
            autocast or layer.disable_adapters
        )


class AdaptedLinear(_AdaptedLayer, lora.Linear):
    """peft's linear layer."""

    narrow_width = 192

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with the adapter's, `(..., features)`."""
        weight = self.weight_for(x)
        if weight is not None:
            return linear(x, weight, self.base_layer.bias)
        if not self.is_plain(x):
            return super().forward(x, *args, **kwargs)
        thin = functional.linear(x, self.lora_A[ADAPTER].weight).flatten(0, -2)
        output = self.base_layer(x)
        return torch.addmm(output.flatten(0, -2), thin, self.lora_B[ADAPTER].weight.t()).view_as(output)


class AdaptedConv2d(_AdaptedLayer, lora.Conv2d):
    """peft's convolution."""

    narrow_width = 64

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with the adapter's, `(batch, channels, height, width)`."""
        weight = self.weight_for(x)
        if weight is None:
            return super().forward(x, *args, **kwargs)
        return self.base_layer._conv_forward(x, weight, self.base_layer.bias)


def replace_layers(denoiser: nn.Module) -> None:
    """Make peft's layers in a denoiser those of this module; their weights and names stay.

    A layer that is not the plain case (one adapter of scale 1, without dropout; a convolution without groups) stays
    peft's.
    """
    for layer in denoiser.modules():
        for theirs, ours in ((lora.Linear, AdaptedLinear), (lora.Conv2d, AdaptedConv2d)):
            if type(layer) is theirs and _is_simple(layer):
                layer.__class__ = ours


def _is_simple(layer: Any) -> bool:
    return (
        list(layer.lora_A) == [ADAPTER]
        and layer.scaling[ADAPTER] == 1
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_bias[ADAPTER]
        and getattr(layer.base_layer, "groups", 1) == 1
    )


@contextmanager
def merged_adapters(denoiser: nn.Module) -> Iterator[None]:
    """Compute every layer's `W + B A` once, for the calls without gradients inside; weights may not change there."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, _AdaptedLayer)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.merged_weight = layer.adapted_weight().to(cast(Any, layer).base_layer.weight.dtype)
        yield
    finally:
        for layer in layers:
            layer.merged_weight = None
