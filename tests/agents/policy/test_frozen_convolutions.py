"""Frozen convolutions: torch's numbers to the bit, and less kept for the backward pass."""

import pytest
import torch
from helpers.micro_agents import micro_env, micro_policy
from torch import nn
from torch.nn import functional

from agents.policy import frozen_convolutions as module
from agents.policy.frozen_convolutions import FrozenConv2d, frozen_convolution, use_frozen_convolutions
from agents.policy.lora import share_weights


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(module, "LEAST_INPUT", 1)


def kept_bytes(work):
    """Bytes that autograd keeps, every storage once, without parameters."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = work()
    del output
    return sum(kept.values())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"groups": 2, "bias": False},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_outputs_and_gradients_are_torchs_to_the_bit(settings):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, **settings).requires_grad_(False)
    frozen = nn.Conv2d(4, 6, 3, **settings).requires_grad_(False)
    frozen.load_state_dict(plain.state_dict())
    use_frozen_convolutions(frozen)
    assert type(frozen) is FrozenConv2d
    assert frozen.state_dict().keys() == plain.state_dict().keys()
    found = []
    for layer in (plain, frozen):
        pixels = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = layer(pixels)
        output.sin().sum().backward()
        found.append((output, pixels.grad))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_gradient_can_be_differentiated():
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    pixels = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda one: frozen_convolution(one.sin(), weight, None).sin(), pixels)


def test_the_input_is_not_kept():
    layer, pixels = nn.Conv2d(4, 4, 3).requires_grad_(False), torch.randn(2, 4, 8, 8, requires_grad=True)
    use_frozen_convolutions(layer)
    given = pixels * 1
    assert kept_bytes(lambda: functional.conv2d(given, layer.weight, layer.bias)) == 4 * given.numel()
    assert kept_bytes(lambda: layer(given)) == 0


def test_a_weight_that_learns_gets_its_gradient():
    weight, bias = torch.randn(3, 2, 3, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    pixels = torch.randn(1, 2, 5, 5, requires_grad=True)
    frozen_convolution(pixels, weight, bias).sum().backward()
    assert all(one.grad is not None for one in (weight, bias, pixels))
    bias.grad = None
    frozen_convolution(pixels, weight.detach(), bias).sum().backward()
    assert bias.grad is not None


def test_mixed_precision_is_torchs():
    layer = nn.Conv2d(2, 2, 3).requires_grad_(False)
    found = []
    for _ in range(2):
        pixels = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(pixels)
        output.float().sum().backward()
        found.append((output, pixels.grad))
        use_frozen_convolutions(layer)
    assert found[1][0].dtype == torch.bfloat16
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_half_precision_weights():
    layer = nn.Conv2d(2, 2, 3, dtype=torch.bfloat16).requires_grad_(False)
    use_frozen_convolutions(layer)
    pixels = torch.randn(1, 2, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    layer(pixels).sum().backward()
    assert pixels.grad.dtype == torch.bfloat16


def with_plain_convolutions(denoiser):
    """The same network and adapters, with torch's own convolutions."""
    plain = share_weights(denoiser)
    for layer in plain.modules():
        if type(layer) is FrozenConv2d:
            layer.__class__ = nn.Conv2d
    return plain


def test_an_update_keeps_less(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder)
    policy = micro_policy(env, lora_targets="attention")
    observation, _ = env.reset()
    latents, timestep = observation["latents"], observation["timestep"].flatten()
    conditioning = {name: observation[name] for name in env.model.conditioning_shapes}
    kept = [
        kept_bytes(lambda network=network: env.model.predict(network, latents, timestep, conditioning))
        for network in (policy.denoiser, with_plain_convolutions(policy.denoiser))
    ]
    assert kept[0] < 0.9 * kept[1]


def test_small_inputs_are_kept(monkeypatch):
    layer, given = nn.Conv2d(4, 4, 3).requires_grad_(False), torch.randn(2, 4, 8, 8, requires_grad=True) * 1
    use_frozen_convolutions(layer)
    monkeypatch.setattr(module, "LEAST_INPUT", given.numel() + 1)
    assert kept_bytes(lambda: layer(given)) == 4 * given.numel()
    monkeypatch.setattr(module, "LEAST_INPUT", given.numel())
    assert kept_bytes(lambda: layer(given)) == 0
