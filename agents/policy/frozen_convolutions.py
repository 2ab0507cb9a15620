"""Convolutions whose weights do not learn, without a copy of their input for a gradient that nobody asks for.

torch's convolution keeps its input for the backward pass even where only the input's own gradient is wanted, and that
one needs the weight alone. Around adapters most convolutions are frozen: what they kept was a quarter of an update's
activations (docs/performance.md). The numbers are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_INPUT = 2**20
"""Numbers of an input from which it is worth while; of small ones, the memory is not what limits a run."""


class _FrozenConvolution(torch.autograd.Function):
    """`conv2d` that is differentiated by its input only."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.strides, ctx.options = pixels.shape, pixels.stride(), options
        return functional.conv2d(pixels, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        # Of the input, only its shape and its layout in memory are read. (`torch.nn.grad.conv2d_input` gives one that
        # has no layout, and a convolution of pixels whose channels come last would be one of copies.)
        layout = torch.empty_strided(ctx.shape, ctx.strides, dtype=weight.dtype, device=weight.device)
        wanted: tuple[Tensor, None, None] = torch.ops.aten.convolution_backward(
            gradients[0], layout, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return wanted[0], None, None, None


class FrozenConv2d(nn.Conv2d):
    """torch's layer, which computes by `frozen_convolution` where it can."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `(batch, out_channels, ...)` of `(batch, in_channels, height, width)`."""
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
    """Return `torch.nn.functional.conv2d` of the arguments; of a frozen weight without keeping the input.

    Args:
        pixels: `(batch, in_channels, height, width)`.
        weight: `(out_channels, in_channels / groups, height, width)`.
        bias: `(out_channels,)`, or none.
        stride: of both axes, and so on.
        padding: zeros on every side.
        dilation: distance of the weight's pixels.
        groups: into which the channels are cut.
    """
    options = stride, padding, dilation, groups
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    place = pixels.device.type
    if (
        learns
        or not (torch.is_grad_enabled() and pixels.requires_grad)
        or pixels.numel() < LEAST_INPUT
        or (torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place))
        or torch.compiler.is_compiling()  # which decides itself what is kept
    ):
        return functional.conv2d(pixels, weight, bias, *options)
    output: Tensor = _FrozenConvolution.apply(pixels, weight, bias, options)
    return output


def forget_inputs(denoiser: nn.Module) -> None:
    """Let a denoiser's convolutions compute by `frozen_convolution`; weights and names stay."""
    for layer in denoiser.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = FrozenConv2d
