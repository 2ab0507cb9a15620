"""Freed memory that stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

from agents import allocator

FAULTS = """
import resource, sys
import torch
from agents.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    held = [torch.zeros(2**20) for _ in range(16)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(choice):
    environment = {name: value for name, value in os.environ.items() if name not in allocator._USERS_OWN}
    command = [sys.executable, "-c", FAULTS, choice]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
def test_what_is_freed_is_not_fetched_from_the_system_again():
    assert page_faults("leave") > 10_000  # of 16 × 1,024 pages, ten times
    assert page_faults("keep") < 3_000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_settings_of_the_users_own_are_left_alone(monkeypatch, name):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("malloc was changed"))
    monkeypatch.setenv(name, "1")
    assert not allocator.keep_freed_memory()


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("malloc was changed"))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
