"""The denoiser compiled by `torch.compile`: faster calls after minutes of compiling, for long runs."""

from __future__ import annotations

import os
import shutil
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

BACKEND = "inductor"


def compile_denoiser(denoiser: nn.Module) -> None:
    """Compile a denoiser at its first call, in place; its weights keep their names.

    There is one graph for sampling, one for training and one for calls without gradients. No graph depends on the
    batch size.

    Raises:
        ValueError: if the denoiser is on a CPU and there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if next(denoiser.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"compile_denoiser must be False without a C++ compiler on a CPU; {compiler!r} is not there")
    options: dict[str, Any] = {"backend": BACKEND, "dynamic": None}
    denoiser.compile(**options)
    compiled: Any = denoiser._compiled_call_impl

    @wraps(compiled)
    def call(*arguments: Any, **named: Any) -> Any:
        inputs = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor) and value.ndim]
        for value in inputs:
            if len(value) == len(inputs[0]):
                torch._dynamo.maybe_mark_dynamic(value, 0)  # the batch has another size in other calls
        return compiled(*arguments, **named)

    denoiser._compiled_call_impl = call
