"""Dtypes of numbers on devices that this machine does not have; `test_cuda` and `test_host_waits` have the copies."""

import torch

from ddpo_env.tensors import widest_float


def test_no_float64_on_mps() -> None:
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == torch.float64
