"""The memory of one pretend device: what is allocated, its peak, and the error when it is full."""

import weakref
from typing import Any

import torch
from torch import Tensor

_BLOCK = 512
"""Bytes; CUDA's caching allocator rounds every allocation up to a multiple of this."""


class Allocation:
    """One storage of the device, alive as long as a tensor uses it."""

    def __init__(self, memory: "Memory", size: int) -> None:
        self._release = weakref.finalize(self, memory.release, size)
        memory.take(size)


class Memory:
    """Bytes of one device."""

    def __init__(self, index: int, capacity: int) -> None:
        self.index = index
        self.capacity = capacity
        self.allocated = 0
        self.peak = 0
        self._allocations: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()

    def allocation_of(self, inner: Tensor) -> Allocation:
        """Return the allocation that a tensor uses; views of a storage share one.

        Raises:
            torch.OutOfMemoryError: if the device has too little memory for a new storage.
        """
        storage: Any = inner.untyped_storage()
        allocation = self._allocations.get(storage._cdata)
        if allocation is None:
            size = -(-storage.nbytes() // _BLOCK) * _BLOCK
            if self.allocated + size > self.capacity:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU {self.index} has a total "
                    f"capacity of {self.capacity / 2**30:.2f} GiB"
                )
            allocation = self._allocations[storage._cdata] = Allocation(self, size)
        return allocation

    def take(self, size: int) -> None:
        """Count an allocation."""
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def release(self, size: int) -> None:
        """Count the end of an allocation."""
        self.allocated -= size
