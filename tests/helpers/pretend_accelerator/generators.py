"""Random generators of the pretend device: counter-based like CUDA's, with a stream that differs from the CPU's."""

import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

CpuGenerator = torch.Generator
"""The class of torch, under a name that stays when `torch.Generator` is replaced."""
_STATE = struct.Struct("<QQ")
_MIX, _STRIDE = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
_MASK = 2**64 - 1
_global_generator = threading.Lock()


class DeviceGenerator(CpuGenerator):
    """A generator of the pretend device; its state is a seed and an offset, 16 bytes, as CUDA's."""

    draws_as_host: ClassVar[bool] = False
    """Whether it draws what a generator of the CPU with the same seed draws; then its state cannot be saved."""

    def __new__(cls, device: Any = "cuda") -> Any:
        """Return a generator of `device`."""
        return super().__new__(cls)  # of the CPU for C++, which has no other

    def __init__(self, device: Any = "cuda") -> None:
        place = torch.device(device)
        _known[self._cdata] = self
        self._device = torch.device("cuda", place.index or 0)
        self._seed, self._offset = 67280421310721, 0

    @staticmethod
    def of(generator: torch.Generator) -> "DeviceGenerator | None":
        """Return the generator behind the handle that an operation gets, if it is of the device."""
        return _known.get(generator._cdata)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device whose tensors it fills."""
        return self._device

    def manual_seed(self, seed: int) -> "DeviceGenerator":  # type: ignore[override]
        """Begin the stream of a seed."""
        self._seed, self._offset = seed & _MASK, 0
        super().manual_seed(seed)
        return self

    def seed(self) -> int:
        """Begin the stream of a random seed, and return it."""
        self.manual_seed(CpuGenerator().seed())
        return self._seed

    def initial_seed(self) -> int:
        """Return the seed."""
        return self._seed

    def get_state(self) -> Tensor:
        """Return the state, 16 bytes on the host."""
        return torch.frombuffer(bytearray(_STATE.pack(self._seed, self._offset)), dtype=torch.uint8)

    def set_state(self, new_state: Tensor) -> None:  # type: ignore[override]
        """Continue from a state; that of a CPU's generator has another size."""
        if new_state.device.type != "cpu" or new_state.dtype != torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor")
        if new_state.numel() != _STATE.size:
            raise RuntimeError("RNG state is wrong size")
        self._seed, self._offset = _STATE.unpack(bytes(new_state.tolist()))

    def clone_state(self) -> "DeviceGenerator":
        """Return a generator with the same state."""
        other = DeviceGenerator(self._device)
        other.set_state(self.get_state())
        return other

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let operations without a generator draw this one's next numbers inside this context."""
        if not self.draws_as_host:
            super().manual_seed((self._seed * _MIX + (self._offset + 1) * _STRIDE) & _MASK)
        self._offset += 4  # CUDA's offsets are multiples of 4
        with _global_generator:
            saved = torch.default_generator.get_state()
            torch.default_generator.set_state(super().get_state())
            try:
                yield
            finally:
                super().set_state(torch.default_generator.get_state())
                torch.default_generator.set_state(saved)


_known: weakref.WeakValueDictionary[int, DeviceGenerator] = weakref.WeakValueDictionary()


class _EveryGenerator(type(CpuGenerator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, CpuGenerator)


class Generator(CpuGenerator, metaclass=_EveryGenerator):
    """What `torch.Generator` is while there is a pretend device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        """Return a generator of `device`."""
        return DeviceGenerator(device) if torch.device(device).type == "cuda" else CpuGenerator(device)
