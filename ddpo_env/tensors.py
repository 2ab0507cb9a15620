"""Values on their way between host and device: copies that do not wait, and numbers that are read with one wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def widest_float(device: torch.device) -> torch.dtype:
    """Return the most accurate dtype of a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def copied_to(values: Any, device: str | torch.device) -> torch.Tensor:
    """Return an array or a tensor on a device, without waiting for the device's unfinished work.

    The caller may change `values` afterwards: CUDA reads pageable memory before the call returns. MPS does not, so the
    copy to MPS waits. Values that are on the device already are not copied.
    """
    return torch.as_tensor(values).to(device, non_blocking=torch.device(device).type != "mps")


def read_numbers(scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return scalar tensors of one device, or of the host, as numbers; the host waits for the device once."""
    moved = [one.detach().to(widest_float(one.device)) for one in scalars.values() if one.device.type != "cpu"]
    read = iter(torch.stack(moved).tolist() if moved else ())
    return {name: next(read) if one.device.type != "cpu" else float(one) for name, one in scalars.items()}
