"""Linear layers by convolution: the sums of `torch.nn.functional.linear`, where it is used and where not."""

import pytest
import torch
from micro_agents import micro_env, micro_policy, stir
from test_ppo import collected, denoising_ppo, logged
from torch import nn
from torch.nn import functional

from agents import linear as module
from agents.linear import ConvolvedLinear, linear, prefers_convolutions

LIMITS = ("LEAST_PRODUCTS", "LEAST_PRODUCTS_WITH_GRADIENT")


@pytest.fixture
def convolving(monkeypatch):
    """As on a processor that gains, for layers of any size; counts the convolutions of linear layers."""
    monkeypatch.setattr(module, "prefers_convolutions", lambda: True)
    for name in LIMITS:
        monkeypatch.setattr(module, name, 1)
    calls = []
    convolution = functional.conv2d
    monkeypatch.setattr(module.functional, "conv2d", lambda *given: calls.append(given) or convolution(*given))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_outputs_and_gradients_are_those_of_a_matrix_product(convolving, bias, contiguous):
    torch.manual_seed(0)
    rows = torch.randn(3, 7, 20) if contiguous else torch.randn(3, 20, 7).transpose(1, 2)
    weight, offset = torch.randn(11, 20), torch.randn(11) if bias else None
    found = []
    for layer in (linear, functional.linear):
        given = [one.clone().requires_grad_() for one in (rows, weight, offset) if one is not None]
        output = layer(*given, *([] if bias else [None]))
        output.sin().sum().backward()
        found.append((output, *(one.grad for one in given)))
    assert len(convolving) == 1
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    assert found[0][0].is_contiguous() or not contiguous, "what follows would copy it"


def test_a_product_stays_one_where_convolutions_do_not_gain(convolving, monkeypatch):
    rows, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    linear(torch.randn(6, 8), weight, None)  # no batch of rows: an embedding of the time
    linear(rows.double(), weight.double(), None)
    with torch.autocast("cpu", torch.bfloat16):
        linear(rows, weight, None)
    for name, with_gradient in zip(LIMITS, (False, True), strict=True):
        monkeypatch.setattr(module, name, 2 * 3 * 5 * 8 + 1)
        with torch.set_grad_enabled(with_gradient):
            linear(rows, weight, None)
            assert convolving == []
            monkeypatch.setattr(module, name, 2 * 3 * 5 * 8)
            linear(rows, weight, None)
        assert len(convolving) == 1
        convolving.clear()


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_it_is_for_amds_processors_with_the_wide_registers(monkeypatch, tmp_path, vendor, capability, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert prefers_convolutions.__wrapped__() == (expected and with_both)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_denoiser_that_learns_uses_it_and_the_shared_one_does_not(convolving, micro_pipeline_folder, rank):
    policy = micro_policy(micro_env(micro_pipeline_folder), lora_rank=rank)
    kinds = {type(layer) for layer in policy.denoiser.modules()}
    assert ConvolvedLinear in kinds
    assert nn.Linear not in kinds
    assert not any(isinstance(layer, ConvolvedLinear) for layer in policy.model.denoiser.modules())


def test_ratio_starts_at_1_although_the_batch_decides(convolving, micro_pipeline_folder, monkeypatch):
    """Rollouts of 6 rows convolve, updates of 5 rows do not, or only their larger layers."""
    for name in LIMITS:
        monkeypatch.setattr(module, name, 2**14)
    model = denoising_ppo(micro_pipeline_folder, micro_batch_size=5, batch_size=12)
    stir(model.policy, 0.02)
    collected(model).train()
    assert convolving
    assert logged(model)["train/ratio_deviation"] <= 1e-5
