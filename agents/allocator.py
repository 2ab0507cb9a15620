"""Memory of the processor that is freed and needed again a moment later.

Every call of a denoiser frees its activations, and the next one wants as many. glibc's malloc gives large blocks back
to the system, which hands them out anew page by page, filled with zeros: a tenth of an update's time on a CPU
(docs/performance.md). Accelerators have torch's own caching allocator for this.
"""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names of the parameters, `M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of malloc.h."""

_KEPT_AT_THE_END = 2**31 - 1
_LARGEST_BLOCK = 2**28
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let the process keep freed blocks of up to 256 MiB for itself, from now on.

    The peak of the memory stays what it was; what is held after it does not fall. A user's own settings of malloc in
    the environment, or another allocator, are left alone.

    Returns:
        Whether that is so now; not without glibc, or with settings of the user's own.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _USERS_OWN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_AT_THE_END))
