"""Names of devices and dtypes turned into PyTorch's objects, for denoisers and rewards; and copies to a device."""

from __future__ import annotations

from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn `"auto"` or the name of a device into a device of this machine.

    Raises:
        ValueError: This is not the name of a device, or the machine has no such device.
    """
    available = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        available.append("mps")
    if str(device) == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
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
    """Turn `"auto"` (float32 on a CPU, bfloat16 on an accelerator) or a name into the dtype of the frozen weights.

    Raises:
        ValueError: It is not one of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
    elif str(dtype) == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    elif str(dtype) in DTYPES:
        return DTYPES[str(dtype)]
    raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}; got {dtype!r}")


def copied_to(values: Any, device: str | torch.device) -> torch.Tensor:
    """Return an array or a tensor on a device, without waiting for the device's unfinished work.

    The caller may change `values` afterwards: CUDA reads pageable memory before the call returns. MPS does not, so the
    copy to MPS waits. Values that are on the device already are not copied.
    """
    return torch.as_tensor(values).to(device, non_blocking=torch.device(device).type != "mps")
