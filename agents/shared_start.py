"""What both halves of classifier-free guidance have in common, computed once.

Guidance calls the denoiser for a latent twice, with the prompt and without. Up to its first cross-attention a UNet has
not seen the prompt: there both halves are the same numbers. Hooks let it start with the latents alone and double the
rows where the text, which has twice as many, comes in. A call whose rows are as many as the text's is what it was.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from torch import Tensor, nn

_OTHER_INPUTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Configuration of inputs that may differ between the halves before the text does."""


def share_start(denoiser: nn.Module) -> bool:
    """Let a UNet take latents and timesteps of half as many rows as its text has; weights and names stay.

    Returns:
        Whether it can now; not where the halves differ from the beginning, or in a network of another kind.
    """
    if not isinstance(denoiser, UNet2DConditionModel):
        return False
    before_text, kinds = [], [type(block) for block in denoiser.down_blocks]
    for block in denoiser.down_blocks:
        if isinstance(block, CrossAttnDownBlock2D):
            break
        before_text.append(block)
    if (
        any(getattr(denoiser.config, name, None) is not None for name in _OTHER_INPUTS)
        or CrossAttnDownBlock2D not in kinds
        or any(type(block) is not DownBlock2D for block in before_text)
    ):
        return False
    first = denoiser.down_blocks[len(before_text)]
    first.attentions[0].register_forward_pre_hook(_double_pixels, with_kwargs=True)
    for module in denoiser.modules():
        if isinstance(module, ResnetBlock2D):
            module.register_forward_pre_hook(_double_embedding)
    for block in denoiser.up_blocks:
        block.register_forward_pre_hook(_double_skipped, with_kwargs=True)
    return True


def _double_pixels(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Before the first attention: `(batch, ...)` as many times as the text has rows for it."""
    return (_as_many(args[0], kwargs["encoder_hidden_states"].shape[0]), *args[1:]), kwargs


def _double_embedding(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a residual block: the timestep's embedding for the rows that there are by then."""
    pixels, embedding, *others = args
    return (pixels, embedding if embedding is None else _as_many(embedding, pixels.shape[0]), *others)


def _double_skipped(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Before a block on the way up: what was kept on the way down, from before the text too."""
    rows = kwargs["hidden_states"].shape[0]
    kept = tuple(_as_many(one, rows) for one in kwargs["res_hidden_states_tuple"])
    return args, {**kwargs, "res_hidden_states_tuple": kept}


def _as_many(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor]) if 2 * tensor.shape[0] == rows else tensor
