"""Attention by batched products: torch's own numbers and gradients, where it is used and where not."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from micro_agents import micro_env, micro_policy
from torch.nn import functional

from agents import attention as module
from agents.attention import BatchedAttention, batched_attention, use_batched_attention


def split(tokens, heads):
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)


def torchs(query, key, value, heads):
    output = functional.scaled_dot_product_attention(*(split(one, heads) for one in (query, key, value)))
    return output.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("tokens", "others"), [(16, 16), (9, 77), (40, 3), (1, 1)])
@pytest.mark.parametrize("at_once", [2**17, 1500, 1], ids=["all heads at once", "some", "one by one"])
def test_outputs_and_gradients_are_those_of_torch(monkeypatch, tokens, others, at_once):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    torch.manual_seed(tokens)
    given = [2 * torch.randn(3, length, 20, dtype=torch.float64) for length in (tokens, others, others)]
    target, found = torch.randn(3, tokens, 20, dtype=torch.float64), []
    for attend in (batched_attention, torchs):
        inputs = [one.clone().requires_grad_() for one in given]
        output = attend(*inputs, 4)
        (output - target).square().sum().backward()
        found.append((output, *(one.grad for one in inputs)))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_gradient_is_the_differences_of_the_output():
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True) for length in (4, 5, 5)]
    assert torch.autograd.gradcheck(lambda *given: batched_attention(*given, 3), inputs)
    assert torch.autograd.gradgradcheck(lambda *given: batched_attention(*given, 3), inputs)


def test_large_scores_stay_finite():
    query = torch.full((1, 2, 8), 1e4)
    assert batched_attention(query, query, query, 1).isfinite().all()


def layer(others=None, heads=4, head=8, **settings):
    torch.manual_seed(0)
    made = Attention(query_dim=24, cross_attention_dim=others, heads=heads, dim_head=head, **settings)
    assert type(made.processor) is AttnProcessor2_0, "diffusers' default"
    return made


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(module, "batched_attention", lambda *given: made.append(given) or batched_attention(*given))
    return made


@pytest.mark.parametrize("others", [None, 10])
def test_a_layer_computes_what_it_did(calls, others):
    made = layer(others, rescale_output_factor=2.0)
    tokens = torch.randn(3, 16, 24)
    text = None if others is None else torch.randn(3, 7, others)
    expected = made(tokens, encoder_hidden_states=text)
    use_batched_attention(made)
    torch.testing.assert_close(made(tokens, encoder_hidden_states=text), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"head": 16}, torch.randn(2, 16, 24)),  # torch's kernel is faster
        ({}, torch.randn(2, 300, 24)),  # more tokens than were measured
        ({}, torch.randn(2, 24, 4, 4)),  # a picture
        ({"residual_connection": True}, torch.randn(2, 16, 24)),
        ({"norm_num_groups": 2}, torch.randn(2, 16, 24)),
        ({"qk_norm": "layer_norm"}, torch.randn(2, 16, 24)),
    ],
)
def test_other_layers_stay_diffusers(calls, settings, tokens):
    made = layer(**settings)
    expected = made(tokens)
    use_batched_attention(made)
    assert torch.equal(made(tokens), expected)
    assert calls == []


def test_masks_and_half_precision_stay_diffusers(calls):
    made, tokens = layer(), torch.randn(2, 16, 24)
    mask = torch.zeros(2, 1, 16).index_fill_(2, torch.tensor([3]), -1e4)
    with torch.autocast("cpu", torch.bfloat16):
        half = made(tokens)
    expected = made(tokens, attention_mask=mask)
    use_batched_attention(made)
    assert torch.equal(made(tokens, attention_mask=mask), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(tokens), half)
    assert calls == []


@pytest.mark.parametrize("rank", [0, 2])
def test_the_denoiser_that_learns_uses_it_and_the_shared_one_does_not(micro_pipeline_folder, rank):
    policy = micro_policy(micro_env(micro_pipeline_folder), lora_rank=rank)
    kinds = [
        {type(one.processor) for one in denoiser.modules() if isinstance(one, Attention)}
        for denoiser in (policy.denoiser, policy.model.denoiser)
    ]
    assert kinds == [{BatchedAttention}, {AttnProcessor2_0}]
