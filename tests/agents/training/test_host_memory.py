"""Freed memory of a CPU is used again instead of being returned to the system."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from agents.training.host_memory import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
before = faults()
for _ in range(4):
    torch.ones(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_a_buffer_of_64_mb_is_used_again():
    """The default is measured too, so that the test fails if there is nothing to mend any more."""
    faults = {}
    for mode in ("default", "keep"):
        command = [sys.executable, "-c", _FAULTS, mode]
        faults[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["default"] > 4 * 1000
    assert faults["keep"] < 100
