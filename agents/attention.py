"""Attention with few tokens and small heads on a CPU: the sums of torch's fused kernel, as batched matrix products.

torch's kernel for CPUs cuts the scores of every head into blocks and multiplies each by itself. Where a head has 8
numbers and a picture 64 tokens, what these products take to begin outweighs them: attention, 6 % of the operations,
was 40 % of an update's time (docs/performance.md). Here the scores of many heads are one batched product, as many as
stay in the processor's cache, with the heads' numbers as the rows of the shorter side, which is the way round that the
library is fast at. As in FlashAttention (Dao et al. 2022, arXiv 2205.14135) the scores are not kept for the backward
pass but computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

LARGEST_HEAD = 8
"""Numbers of a head up to which this gains; with 16, torch's kernel is faster."""

MOST_TOKENS = 256
"""Tokens of queries, and of keys, up to which this was measured to gain."""

SCORES_AT_ONCE = 2**17
"""Scores that are held at a time, half a MiB."""


class _BatchedAttention(torch.autograd.Function):
    """`value softmax(query^T key)^T` of `(batch, head, tokens)`, and its gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        for q, k, v, o in _parts(query, key, value, output):
            torch.bmm(v, _weights(q, k).transpose(1, 2), out=o)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, output = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated too, as TRPO does
            return _differentiable_gradient(query, key, value, output, gradients[0])
        gradient = gradients[0].contiguous()
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        # The softmax's derivative: every weight times how much better its token is than the average that was taken.
        average = (gradient * output).sum(1).unsqueeze(2)
        for q, k, v, g, mean, to_q, to_k, to_v in _parts(query, key, value, gradient, average, *found):
            weights = _weights(q, k)
            torch.bmm(g, weights, out=to_v)
            scores = torch.bmm(g.transpose(1, 2), v).sub_(mean).mul_(weights)
            torch.bmm(k, scores.transpose(1, 2), out=to_q)
            torch.bmm(q, scores, out=to_k)
        return found


def _differentiable_gradient(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _weights(query, key)
    average = (gradient * output).sum(1).unsqueeze(2)
    scores = (gradient.transpose(1, 2) @ value - average) * weights
    return key @ scores.transpose(1, 2), query @ scores, gradient @ weights


def _parts(query: Tensor, key: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut the first axis of all into parts whose scores fit."""
    size = max(1, SCORES_AT_ONCE // (query.shape[2] * key.shape[2]))
    return zip(*(one.split(size) for one in (query, key, *others)), strict=True)


def batched_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Return softmax attention, `(batch, tokens, heads * head)`, of heads whose numbers lie side by side.

    Args:
        query: `(batch, tokens, heads * head)`.
        key: `(batch, other tokens, heads * head)`.
        value: the same.
        heads: into which the last axis is cut; scores are scaled by the root of a head's size.
    """
    scale = (query.shape[2] // heads) ** -0.5
    columns = [_columns(query * scale, heads), _columns(key, heads), _columns(value, heads)]
    output: Tensor = _BatchedAttention.apply(*columns)
    return output.view(query.shape[0], -1, query.shape[1]).transpose(1, 2).contiguous()


class BatchedAttention(AttnProcessor2_0):
    """diffusers' attention of UNets, whose products are `batched_attention` where that is faster."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return `(batch, tokens, channels)` of the same, attending to itself or to `encoder_hidden_states`."""
        others = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None or not (_is_plain(attn) and _gains(hidden_states, others, attn)):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        query, key, value = attn.to_q(hidden_states), attn.to_k(others), attn.to_v(others)
        attended = attn.to_out[1](attn.to_out[0](batched_attention(query, key, value, attn.heads)))
        return attended / attn.rescale_output_factor


def use_batched_attention(denoiser: nn.Module) -> None:
    """Let a denoiser's attention layers with diffusers' own processor compute by `BatchedAttention`."""
    for layer in denoiser.modules():
        if isinstance(layer, Attention) and type(layer.processor) is AttnProcessor2_0:
            layer.set_processor(BatchedAttention())


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """`(batch, query's tokens, key's tokens)`."""
    return torch.bmm(query.transpose(1, 2), key).softmax(-1)


def _columns(tokens: Tensor, heads: int) -> Tensor:
    """`(batch, tokens, heads * head)` → `(batch * heads, head, tokens)`."""
    return tokens.transpose(1, 2).unflatten(1, (heads, -1)).flatten(0, 1).contiguous()


def _is_plain(attn: Attention) -> bool:
    norms = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    return not any(norms) and not attn.residual_connection


def _gains(tokens: Tensor, others: Tensor, attn: Attention) -> bool:
    return (
        tokens.ndim == 3
        and max(tokens.shape[1], others.shape[1]) <= MOST_TOKENS
        and attn.inner_dim // attn.heads <= LARGEST_HEAD
        and tokens.device.type == "cpu"
        and tokens.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
