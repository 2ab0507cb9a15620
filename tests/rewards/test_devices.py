"""Device and dtype follow what the machine can do, which is pretended here."""

import pytest
import torch

from rewards.networks.devices import resolve_device, resolve_dtype


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: False)


def test_auto_chooses_what_there_is(monkeypatch: pytest.MonkeyPatch, mac: None) -> None:
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda", 0)


def test_dtype_is_one_that_the_device_has(monkeypatch: pytest.MonkeyPatch, mac: None) -> None:
    mps, cuda, cpu = (torch.device(name) for name in ("mps", "cuda", "cpu"))
    assert resolve_dtype("auto", mps) == torch.float32
    with pytest.raises(ValueError, match="dtype must be auto, float32 or float16 on mps.*'bfloat16'"):
        resolve_dtype("bfloat16", mps)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    assert resolve_dtype("auto", mps) == torch.bfloat16
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_it: has)
        assert resolve_dtype("auto", cuda) == expected
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
