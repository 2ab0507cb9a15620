"""Random pipelines of today's families, built from diffusers' own classes: a few thousand weights each."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderSAME,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableAudio3DiTModel,
    StableAudio3DurationEmbedder,
    StableAudio3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5GemmaConfig,
    T5GemmaEncoderModel,
)

from helpers.micro_families import flux, t5
from helpers.micro_pipeline import micro_vae

_LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
_CHAT = "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}\n{% endfor %}"  # noqa: E501


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and a chat template."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *_LETTERS])}
    letters = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=2048,
        chat_template=_CHAT,
        model_input_names=["input_ids", "attention_mask"],
    )


_DECODER = {
    "vocab_size": len(_LETTERS) + 4,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen_image() -> QwenImagePipeline:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_DECODER | {"rope_scaling": rope}, vision_config=vision)
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1] * 4,
            latents_std=[0.9] * 4,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
    )


def _flux_2_parts(guidance_embeds: bool) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": AutoencoderKLFlux2(
            sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            layers_per_block=1,
            latent_channels=2,
            norm_num_groups=2,
        ),
        "tokenizer": tokenizer(),
        "transformer": Flux2Transformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
    }


def flux_2() -> Flux2Pipeline:
    text = {"model_type": "mistral", **_DECODER, "num_hidden_layers": 31, "head_dim": 8}
    vision = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
              "intermediate_size": 16, "image_size": 30, "patch_size": 6}  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return Flux2Pipeline(text_encoder=encoder, **_flux_2_parts(guidance_embeds=True))


def flux_2_klein() -> Flux2KleinPipeline:
    encoder = Qwen3ForCausalLM(Qwen3Config(**_DECODER | {"num_hidden_layers": 28, "head_dim": 8}))
    return Flux2KleinPipeline(text_encoder=encoder, **_flux_2_parts(guidance_embeds=False))


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # which the class leaves as they are in memory
        transformer.x_pad_token.fill_(0.1)
        transformer.cap_pad_token.fill_(0.1)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=micro_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(Qwen3Config(**_DECODER | {"head_dim": 8})),
        tokenizer=tokenizer(),
        transformer=transformer,
    )


def _gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**_DECODER | {"head_dim": 8}))


def sana() -> SanaPipeline:
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=32, patch_size=1,
    )  # fmt: skip
    return SanaPipeline(tokenizer(), _gemma(), vae, transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))


def lumina_2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=8, num_layers=1, num_refiner_layers=1,
        num_attention_heads=1, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(1024, 64, 64),
        cap_feat_dim=16,
    )  # fmt: skip
    vae = micro_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    return Lumina2Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, _gemma(), tokenizer())


def pixart_sigma() -> PixArtSigmaPipeline:
    encoder, words = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=32,
        in_channels=4, cross_attention_dim=16, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(words, encoder, micro_vae(), transformer, DDIMScheduler(steps_offset=1))


def wan() -> WanPipeline:
    encoder, words = t5()
    return WanPipeline(
        tokenizer=words,
        text_encoder=encoder,
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1] * 4,
            latents_std=[0.9] * 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        ),
    )


def ltx() -> LTXPipeline:
    encoder, words = t5()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False, patch_size=1, patch_size_t=1,
    )  # fmt: skip
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=32,
    )  # fmt: skip
    return LTXPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, encoder, words, transformer)


def flux_kontext() -> FluxKontextPipeline:
    parts = {name: part for name, part in flux().components.items() if name != "image_encoder"}
    return FluxKontextPipeline(**parts)


def stable_audio_3() -> StableAudio3Pipeline:
    words = tokenizer()
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512,
        "layer_types": ["full_attention"],
    }  # fmt: skip
    return StableAudio3Pipeline(
        vae=AutoencoderSAME(
            audio_channels=2,
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=8,
            use_differential_attention=False,
            dim_heads=4,
            ff_mult=2,
            sampling_rate=16,
        ),
        text_encoder=T5GemmaEncoderModel(T5GemmaConfig(encoder=text, decoder=text, is_encoder_decoder=False)),
        tokenizer=words,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16),
        transformer=StableAudio3DiTModel(
            io_channels=8,
            patch_size=1,
            embed_dim=32,
            depth=1,
            num_heads=4,
            cond_token_dim=16,
            global_cond_dim=16,
            local_add_cond_dim=5,
            timestep_features_dim=16,
            ff_mult=2,
            num_memory_tokens=3,
            use_differential_attention=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


@dataclass(frozen=True)
class Case:
    """A family in the tests.

    Attributes:
        build: makes its pipeline.
        arguments: of every call: small sizes.
        scale: name of the argument that turns classifier-free guidance on, if it has any.
    """

    build: Callable[[], DiffusionPipeline]
    arguments: dict[str, Any] = field(default_factory=dict)
    scale: str | None = "guidance_scale"


_SIZE = {"height": 32, "width": 32}
IMAGE = Image.fromarray(torch.arange(32 * 32 * 3).remainder(251).view(32, 32, 3).to(torch.uint8).numpy())
CASES: dict[str, Case] = {
    "qwen_image": Case(qwen_image, _SIZE | {"max_sequence_length": 320}, "true_cfg_scale"),
    "flux_2": Case(flux_2, {"max_sequence_length": 24}, None),
    "flux_2_klein": Case(flux_2_klein, {"max_sequence_length": 24}),
    "z_image": Case(z_image, {"max_sequence_length": 48}),
    "sana": Case(sana, _SIZE | {"max_sequence_length": 24}),
    "lumina_2": Case(lumina_2, {"max_sequence_length": 256}),
    "pixart_sigma": Case(pixart_sigma, {"max_sequence_length": 24}),
    "wan": Case(wan, {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 24}),
    "ltx": Case(ltx, _SIZE | {"num_frames": 9, "max_sequence_length": 24}),
    "stable_audio_3": Case(stable_audio_3, {"duration": 1.0}),
    "flux_kontext": Case(
        flux_kontext, _SIZE | {"image": IMAGE, "max_area": 1024, "_auto_resize": False}, "true_cfg_scale"
    ),
}


def build(name: str, seed: int = 0) -> DiffusionPipeline:
    """The random pipeline of a case; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = CASES[name].build()
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    return pipeline
