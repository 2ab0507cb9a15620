"""Linear layers on a processor whose matrix products are slow: by a 1×1 convolution, which is the same sum.

torch gives float32 matrix products to MKL and convolutions to oneDNN. On AMD's processors with AVX-512, MKL uses half
of a register: a product takes twice as long as a convolution with the same numbers (docs/performance.md). On all other
processors, and for layers that are too small to gain, linear layers stay what they are.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from agents.frozen import frozen_convolution

LEAST_PRODUCTS, LEAST_PRODUCTS_WITH_GRADIENT = 2**22, 2**24
"""Multiplications of a call from which a convolution gains; below, what it takes to begin outweighs that."""

_CPUINFO = Path("/proc/cpuinfo")


class ConvolvedLinear(nn.Linear):
    """A linear layer that computes by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `(..., out_features)` of `(..., in_features)`."""
        return linear(input, self.weight, self.bias)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `torch.nn.functional.linear` of the arguments, by a convolution where that is faster.

    Args:
        rows: `(..., in_features)`.
        weight: `(out_features, in_features)`.
        bias: `(out_features,)`, or none.

    Returns:
        `(..., out_features)`.
    """
    if not _gains(rows, weight):
        return functional.linear(rows, weight, bias)
    # (batch, length, features) is a picture of 1 × length pixels with its channels last: nothing is copied.
    pixels = rows.transpose(1, 2).unsqueeze(2)
    return frozen_convolution(pixels, weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)


def use_convolutions(denoiser: nn.Module) -> None:
    """Let a denoiser's linear layers compute by `linear`, on a processor that gains; weights and names stay."""
    if not prefers_convolutions():
        return
    for layer in denoiser.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = ConvolvedLinear


@cache
def prefers_convolutions() -> bool:
    """Whether this is a processor on which MKL's matrix products are at half of oneDNN's rate."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    vendor = "AuthenticAMD" in _CPUINFO.read_text() if _CPUINFO.is_file() else False
    return vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _gains(rows: Tensor, weight: Tensor) -> bool:
    least = LEAST_PRODUCTS_WITH_GRADIENT if torch.is_grad_enabled() else LEAST_PRODUCTS
    return (
        rows.ndim == 3
        and rows.shape[0] * rows.shape[1] * weight.numel() >= least
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and prefers_convolutions()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
