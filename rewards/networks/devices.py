"""Names of devices and dtypes turned into PyTorch's objects, for denoisers and rewards."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn `"auto"` (CUDA, else MPS, else the CPU) or the name of a device into a device of this machine.

    Raises:
        ValueError: This is not the name of a device, or the machine has no such device.
    """
    available = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        available.append("mps")
    if str(device) == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device(available[-1].split(":")[0])
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be auto or one of {', '.join(available)}; got {device!r}") from None
    if resolved.type == "cuda" and resolved.index is None and torch.cuda.is_available():
        resolved = torch.device("cuda", torch.cuda.current_device())
    if resolved.type in ("cpu", "mps"):
        resolved = torch.device(resolved.type)
    if str(resolved) not in available:
        raise ValueError(f"device must be auto or one of {', '.join(available)} on this machine; got {str(device)!r}")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Turn `"auto"` or a name into the dtype of the frozen weights.

    `"auto"` is bfloat16 on an accelerator that has it, and float32 elsewhere: float16 has a small range, in which
    VAEs overflow, so it is never chosen without being asked for.

    Raises:
        ValueError: It is not one of `DTYPES`, or the device does not have it.
    """
    if str(dtype) == "auto":
        return torch.bfloat16 if device.type != "cpu" and has_bfloat16(device) else torch.float32
    resolved = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype))
    if resolved is None or resolved not in DTYPES.values():
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}; got {dtype!r}")
    if resolved == torch.bfloat16 and not has_bfloat16(device):
        raise ValueError(f"dtype must be auto, float32 or float16 on {device}, which has no bfloat16; got {dtype!r}")
    return resolved


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16: GPUs since Ampere, MPS since macOS 14, and every CPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)
