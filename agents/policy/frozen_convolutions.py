"""Convolutions with frozen weights that do not keep their input for the backward pass.

torch's convolution keeps its input even where only the input's gradient is needed, and that gradient needs the weight
only. With LoRA most convolutions are frozen, and their inputs were a quarter of an update's activations
(docs/performance.md). Outputs and gradients are bit-identical to torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_INPUT = 2**20
"""Elements of an input from which the saving matters; smaller inputs do not limit a run."""


class _FrozenConvolution(torch.autograd.Function):
    """`conv2d` that is differentiated with respect to its input only."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.strides, ctx.options = pixels.shape, pixels.stride(), options
        return functional.conv2d(pixels, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        # Only the shape and the memory layout of the input are read. (`torch.nn.grad.conv2d_input` makes an input
        # without a layout, and a channels-last convolution would then copy.)
        layout = torch.empty_strided(ctx.shape, ctx.strides, dtype=weight.dtype, device=weight.device)
        wanted: tuple[Tensor, None, None] = torch.ops.aten.convolution_backward(
            gradients[0], layout, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return wanted[0], None, None, None


class FrozenConv2d(nn.Conv2d):
    """torch's layer, computed by `frozen_convolution` where that is possible."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `(batch, out_channels, ...)` for `(batch, in_channels, height, width)`."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super().forward(input)
        return frozen_convolution(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def frozen_convolution(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return `torch.nn.functional.conv2d` of the arguments; with a frozen weight the input is not kept.

    Args:
        pixels: `(batch, in_channels, height, width)`.
        weight: `(out_channels, in_channels / groups, height, width)`.
        bias: `(out_channels,)`, or none.
        stride: of each axis.
        padding: zeros on every side of each axis.
        dilation: distance of the weight's elements on each axis.
        groups: number of channel groups.
    """
    options = stride, padding, dilation, groups
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    place = pixels.device.type
    if (
        learns
        or not (torch.is_grad_enabled() and pixels.requires_grad)
        or pixels.numel() < LEAST_INPUT
        or (torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place))
        or torch.compiler.is_compiling()  # the compiler decides itself what is kept
    ):
        return functional.conv2d(pixels, weight, bias, *options)
    output: Tensor = _FrozenConvolution.apply(pixels, weight, bias, options)
    return output


def use_frozen_convolutions(denoiser: nn.Module) -> None:
    """Make a denoiser's convolutions compute by `frozen_convolution`; weights and names stay."""
    for layer in denoiser.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = FrozenConv2d
