"""Makes torch believe in the pretend devices: its queries, generators, pinned memory and modules that move."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from helpers.pretend_accelerator.generators import DeviceGenerator, Generator
from helpers.pretend_accelerator.memory import Memory
from helpers.pretend_accelerator.tensors import Devices, NameMode, modes
from helpers.pretend_accelerator.waits import Waits

_GIB = 2**30
_NAME = "Pretend Accelerator"
_SYNC_MODES = ("default", "warn", "error")


class Accelerator:
    """What a test asks the pretend devices beyond torch's own queries."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    @property
    def waits(self) -> Waits:
        """How often the host has waited, by function of this project."""
        return self._devices.waits

    def counted_waits(self) -> AbstractContextManager[Any]:
        """Count the waits inside a context, by function of this project."""
        return self.waits.counted()

    def limit_memory(self, capacity: int, index: int = 0) -> None:
        """Let a device have this many bytes."""
        self._devices.memory[index].capacity = capacity


@contextmanager
def pretend_accelerator(
    devices: int = 1, memory: int = 8 * _GIB, bfloat16: bool = True, noise_of_host: bool = False
) -> Iterator[Accelerator]:
    """Pretend that this machine has devices of CUDA inside this context.

    Args:
        devices: their number.
        memory: bytes of each.
        bfloat16: whether they compute in it, as GPUs since Ampere do.
        noise_of_host: whether their generators draw what the CPU's draw, so that results can be compared.
    """
    pretended = Devices([memory] * devices)
    with _patched(_replacements(pretended, bfloat16, noise_of_host)), modes(pretended):
        yield Accelerator(pretended)


@contextmanager
def _patched(replacements: list[tuple[Any, str, Any]]) -> Iterator[None]:
    patches = [patch.object(owner, name, value) for owner, name, value in replacements]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in reversed(patches):
            one.stop()


def _replacements(devices: Devices, bfloat16: bool, noise_of_host: bool) -> list[tuple[Any, str, Any]]:
    cuda = _cuda_functions(devices, bfloat16)

    def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
        if tensor.device.type != "cpu":
            raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
        return devices.pin(tensor.clone())

    def is_pinned(tensor: Tensor, device: Any = None) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in devices.pinned

    apply, run, run_backward = nn.Module._apply, threading.Thread.run, torch.autograd._engine_run_backward

    def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Keep the parameters' identity, as a move between real devices does."""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):  # its weight holds the parameters, and is computed anew by every call
                vars(module)[hook.name] = vars(module)[hook.name].detach()
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(module, fn, recurse)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    def thread_run(thread: threading.Thread) -> None:
        with modes(devices):  # a mode belongs to one thread
            run(thread)

    def engine_run_backward(*args: Any, **kwargs: Any) -> Any:
        """Use the modes inside a backward pass, in which gradient checkpointing computes; torch has put them aside."""
        with torch._C._EnableTorchFunction(), NameMode(devices):
            return run_backward(*args, **kwargs)

    return [
        *((torch.cuda, name, value) for name, value in cuda.items()),
        *((torch.cuda.memory, name, value) for name, value in cuda.items() if hasattr(torch.cuda.memory, name)),
        *((torch.cuda.random, name, cuda[name]) for name in ("_lazy_init", "current_device", "device_count")),
        (torch, "Generator", Generator),
        (DeviceGenerator, "draws_as_host", noise_of_host),
        (Tensor, "pin_memory", pin_memory),
        (Tensor, "is_pinned", is_pinned),
        (nn.Module, "_apply", _apply),
        (threading.Thread, "run", thread_run),
        (torch.autograd, "_engine_run_backward", engine_run_backward),
    ]


def _cuda_functions(devices: Devices, bfloat16: bool) -> dict[str, Any]:
    """Return what `torch.cuda` answers."""

    def memory_of(device: Any = None) -> Memory:
        index = device if isinstance(device, int) else None
        place = devices.resolved(
            "cuda" if device is None else torch.device("cuda", index) if index is not None else device
        )
        assert place is not None
        return devices.memory[place.index]

    def properties(device: Any = None) -> Any:
        major = 8 if bfloat16 else 7
        total = memory_of(device).capacity
        return SimpleNamespace(name=_NAME, total_memory=total, major=major, minor=0, multi_processor_count=1)

    def reset_peak(device: Any = None) -> None:
        memory_of(device).peak = memory_of(device).allocated

    def exchange(index: int) -> int:
        before, devices.current = devices.current, index if index >= 0 else devices.current
        return before

    def synchronize(device: Any = None) -> None:
        memory_of(device)
        devices.waits.finish()

    def set_sync_debug_mode(mode: int | str) -> None:
        devices.waits.mode = _SYNC_MODES[mode] if isinstance(mode, int) else mode

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        memory = memory_of(device)
        return memory.capacity - memory.allocated, memory.capacity

    return {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: len(devices.memory),
        "current_device": lambda: devices.current,
        "set_device": lambda device: exchange(memory_of(device).index),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "is_bf16_supported": lambda including_emulation=True: bfloat16 or including_emulation,
        "get_device_name": lambda device=None: _NAME,
        "get_device_capability": lambda device=None: (8, 0) if bfloat16 else (7, 0),
        "get_device_properties": properties,
        "default_generators": devices.generators,
        "synchronize": synchronize,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: _SYNC_MODES.index(devices.waits.mode),
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "memory_allocated": lambda device=None: memory_of(device).allocated,
        "max_memory_allocated": lambda device=None: memory_of(device).peak,
        "memory_reserved": lambda device=None: memory_of(device).allocated,
        "max_memory_reserved": lambda device=None: memory_of(device).peak,
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": mem_get_info,
    }
