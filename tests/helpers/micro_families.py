"""Random pipelines of every family, built from diffusers' own classes: images 32 × 32, a few thousand weights."""

import re
import string
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import PeftModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from helpers.micro_pipeline import HIDDEN, TOKENS, character_tokenizer, micro_vae

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LEVELS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}


def clip_config(**arguments: Any) -> CLIPTextConfig:
    tokenizer = character_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
        "projection_dim": HIDDEN,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**settings | arguments)


def stable_diffusion_2() -> StableDiffusionPipeline:
    """Velocity prediction, OpenCLIP's text encoder, heads by level, linear projections: Stable Diffusion 2.1."""
    unet = UNet2DConditionModel(
        **LEVELS,
        attention_head_dim=[2, 4],  # in truth the number of heads of each level
        cross_attention_dim=HIDDEN,
        use_linear_projection=True,
        upcast_attention=True,
    )
    return StableDiffusionPipeline(
        vae=micro_vae(),
        text_encoder=CLIPTextModel(clip_config(hidden_act="gelu", num_hidden_layers=1)),
        tokenizer=character_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(**arguments: Any) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        **LEVELS,
        attention_head_dim=[2, 4],
        cross_attention_dim=2 * HIDDEN,
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + HIDDEN,
    )
    return StableDiffusionXLPipeline(
        vae=micro_vae(force_upcast=True),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(hidden_act="gelu")),
        tokenizer=character_tokenizer(),
        tokenizer_2=character_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(
            {**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
        ),
        add_watermarker=False,
        **arguments,
    )


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    letters = [(letter, -3.0) for letter in "▁" + string.ascii_lowercase + string.digits]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TOKENS)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=2 * HIDDEN, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config), tokenizer


def stable_diffusion_3(with_t5: bool = True, **scheduler: Any) -> StableDiffusion3Pipeline:
    """SD 3 with its largest text encoder; without, the transformer is SD 3.5's, with a second attention."""
    new = {} if with_t5 else {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=2 * HIDDEN,
        caption_projection_dim=8,
        pooled_projection_dim=2 * HIDDEN,
        pos_embed_max_size=8,
        **new,
    )
    text_encoder_3, tokenizer_3 = t5() if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae=micro_vae(shift_factor=0.3, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=character_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(hidden_act="gelu")),
        tokenizer_2=character_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    """FLUX.1-dev; without the guidance's embedding and with fixed shifting, FLUX.1-schnell."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * HIDDEN,
        pooled_projection_dim=HIDDEN,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    text_encoder_2, tokenizer_2 = t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
        ),
        vae=micro_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=character_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def ddpm(channels: int = 3, attention: bool = True, **scheduler: Any) -> DDPMPipeline:
    inner = "Attn" if attention else ""
    unet = UNet2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", f"{inner}DownBlock2D"),
        up_block_types=(f"{inner}UpBlock2D", "UpBlock2D"),
        add_attention=attention,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return DDPMPipeline(unet, DDPMScheduler(**scheduler))


FAMILIES: dict[str, Callable[..., DiffusionPipeline]] = {
    "stable_diffusion_2": stable_diffusion_2,
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "stable_diffusion_3.5": partial(stable_diffusion_3, with_t5=False),
    "flux_dev": flux,
    "flux_schnell": partial(flux, guidance_embeds=False),
    "ddpm": ddpm,
}


def micro_family(name: str, seed: int = 0, **arguments: Any) -> DiffusionPipeline:
    """The random pipeline of a family; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = FAMILIES[name](**arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lora_tensors(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the adapters, by its name without the adapter's."""
    named = denoiser.base_model.model if isinstance(denoiser, PeftModel) else denoiser
    return {
        re.sub(r"(lora_[AB])\.\w+", r"\1", name): value for name, value in named.named_parameters() if "lora_" in name
    }
