"""Keeps the memory that tensors on a CPU free for the next ones."""

import ctypes
import platform

# Parameters of `mallopt`, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep freed memory, where its C library is glibc (mallopt(3)); elsewhere this does nothing.

    glibc returns large buffers to the operating system as soon as they are free. A denoiser asks for the same ones in
    its next call, and the system has to clear every page of them again: with Stable Diffusion 1.4's UNet on a CPU, a
    fifth of the time of forward and backward. The peak of memory stays the same (docs/performance.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
