"""Builds the bundled Stable Diffusion with random weights, component by component, and writes the trained pipeline.

The sizes are for a CPU: 64x64 images and 4x16x16 latents. The denoiser attends to the text at 8x8 and 4x4 only, because
attention at 16x16 costs more than everything else. Every block gets the pooled text through the time embedding.
"""

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_LENGTH = 16  # tokens per prompt, with start and end
TEXT_SIZE = 96
LATENT_SHAPE = (4, 16, 16)
DEFAULT_GUIDANCE = 1.0  # the bundled model needs no guidance


def autocast() -> torch.autocast:
    """Return a context with bfloat16 if the CPU has instructions for it. Emulated, it is twelve times slower."""
    has_bfloat16 = any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16)


def build_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer in which every word of the captions is one token; other words are split."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Whitespace()
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learner.decoder = decoders.ByteLevel()
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        sorted(set(captions)),
        BpeTrainer(vocab_size=4096, min_frequency=1, show_progress=False, end_of_word_suffix="</w>"),
    )
    merges = [tuple(merge) for merge in _merges(learner)]
    # OpenAI's vocabulary has this order: bytes, bytes that end a word, merges, start, end.
    tokens = [*characters, *(character + "</w>" for character in characters), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=TEXT_LENGTH
    )


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder for the tokenizer; its output is `(batch, 16, 96)`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_SIZE,
        intermediate_size=4 * TEXT_SIZE,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=TEXT_SIZE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_vae() -> AutoencoderKL:
    """Return an untrained VAE between `(batch, 3, 64, 64)` images in [-1, 1] and `(batch, 4, 16, 16)` latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Return an untrained denoiser of `(batch, 4, 16, 16)` latents, conditioned on `(batch, 16, 96)` text."""
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        layers_per_block=1,
        block_out_channels=(64, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=(1, 2, 3),  # diffusers reads this as the number of heads
        cross_attention_dim=TEXT_SIZE,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
    )


def build_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule, rescaled so that it ends in pure noise, with v-prediction.

    `set_alpha_to_one=False` keeps the last sampling step's standard deviation above zero at eta 1, so that the
    log-probability exists.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def whiten(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Change the VAE so that each latent channel has mean 0 and variance 1 and decoded images stay the same.

    Args:
        vae: Its two 1x1 convolutions next to the latent are changed in place; `scaling_factor` becomes 1.
        latents: Latent means of many images, `(number, 4, 16, 16)`.

    Returns:
        The same latents as the changed VAE encodes them.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    with torch.no_grad():
        vae.quant_conv.weight[:channels] /= std[:, None, None, None]
        vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
        vae.quant_conv.bias[channels:] -= 2 * std.log()  # the other half are log variances
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
    return (latents - mean[:, None, None]) / std[:, None, None]


def export(
    folders: Iterable[Path],
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Write the pipeline as fp16 safetensors; each folder is replaced only when the new one is complete."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for folder in folders:
        fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
        shutil.rmtree(fresh, ignore_errors=True)
        pipeline.save_pretrained(fresh)
        _load_as_float32(fresh / "text_encoder" / "config.json")
        for part in ("unet", "vae"):
            _forget_origin(fresh / part / "config.json")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _load_as_float32(config: Path) -> None:
    """Make transformers load in float32, as diffusers does; without this, it loads in the dtype of the weights."""
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")


def _forget_origin(config: Path) -> None:
    """Take out the folder that a part was loaded from."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n")
