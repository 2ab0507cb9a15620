"""A pretend accelerator: `device="cuda"` on a machine without one, for tests of the code that only a GPU would run.

    with pretend_accelerator(devices=2) as accelerator:
        values = torch.ones(3, device="cuda:1")     # reports cuda:1, computes on the CPU
        values + torch.ones(3)                      # RuntimeError, as CUDA raises
        with accelerator.counted_waits() as waits:  # where the host waits for the device, by function
            values.sum().item()

Tensors of the device are `DeviceTensor`s: wrappers around CPU tensors, through which every ATen operation goes. The
results are those of the CPU, to the bit. Random numbers of the device come from its own generators, whose state has the
layout of CUDA's. Memory is counted in the blocks of 512 bytes of CUDA's allocator, and can run out.

What it does not pretend: speed, asynchronous execution (but a copy to the host with `non_blocking=True` holds garbage
until the host waits), streams, rounding of CUDA's kernels, and `torch.compile`, whose compiler needs a real device.
"""

from helpers.pretend_accelerator.accelerator import Accelerator, pretend_accelerator
from helpers.pretend_accelerator.tensors import DeviceTensor

__all__ = ["Accelerator", "DeviceTensor", "pretend_accelerator"]
