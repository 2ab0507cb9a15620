"""A pipeline in one .safetensors file, in its authors' layout: the same weights, and an error for every other file."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers.lora_files import save_kohya_lora
from helpers.micro_families import clip_config, stable_diffusion_xl
from helpers.micro_pipeline import micro_pipeline
from helpers.original_layout import save_single_file
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ddpo_env.models import check_source, load_model
from ddpo_env.models.outline import outline_model
from ddpo_env.models.sources import family_in


def micro_xl() -> StableDiffusionXLPipeline:
    """SDXL whose text encoders have different sizes, by which diffusers tells them apart."""
    encoders = {
        "text_encoder": CLIPTextModel(clip_config(hidden_size=24)),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(hidden_size=8, hidden_act="gelu")),
    }
    return StableDiffusionXLPipeline(**stable_diffusion_xl().components | encoders, add_watermarker=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_single_file(micro_pipeline(), tmp_path / "dream.v2.safetensors")
    return tmp_path / "dream.v2.safetensors"


@pytest.mark.parametrize("make", [micro_pipeline, micro_xl])
def test_single_file_holds_the_pipelines_weights(make: Callable[[], Any], tmp_path: Path) -> None:
    pipeline = make()
    save_single_file(pipeline, tmp_path / "one.safetensors")
    check_source(tmp_path / "one.safetensors", "cpu")
    model: Any = load_model(tmp_path / "one.safetensors", "cpu")
    assert type(model.pipeline) is type(pipeline)
    for part, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            loaded, expected = getattr(model.pipeline, part).state_dict(), component.state_dict()
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], value) for name, value in expected.items()), part
    outlined = outline_model(tmp_path / "one.safetensors")
    assert outlined is not None
    assert outlined.latent_shape == model.latent_shape
    assert load_model(str(tmp_path / "one.safetensors"), "cpu") is model


def test_what_the_file_lacks_comes_from_the_folder(file: Path) -> None:
    pipeline = micro_pipeline(seed=3)
    pipeline.vae.save_pretrained(file.with_suffix("") / "vae")
    weights = {name: value for name, value in load_file(file).items() if not name.startswith("first_stage_model.")}
    save_file(weights, file)
    vae = load_model(file, "cpu").pipeline.vae  # type: ignore[attr-defined]
    assert all(torch.equal(vae.state_dict()[name], value) for name, value in pipeline.vae.state_dict().items())


def fingerprint(file: Path) -> str:
    return str(family_in(str(file))[1].fingerprint())


def test_fingerprint_follows_the_weights(file: Path, tmp_path: Path) -> None:
    before = fingerprint(file)
    moved = shutil.move(file, tmp_path / "moved.safetensors")
    file.with_suffix("").rename(tmp_path / "moved")
    assert fingerprint(moved) == before
    weights = load_file(moved)
    name = "model.diffusion_model.out.2.bias"
    save_file(weights | {name: weights[name] + 1}, moved)
    assert fingerprint(moved) != before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.out.0.weight", "unet"),
        ("first_stage_model.decoder.conv_in.weight", "vae"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder"),
    ],
)
def test_weight_that_is_missing_is_an_error(file: Path, name: str, said: str) -> None:
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)
    with pytest.raises(
        ValueError, match=rf"dream\.v2\.safetensors' must hold (every weight of the {said}|the weights)"
    ):
        load_model(file, "cpu")


def test_weights_that_are_not_finite_are_an_error(file: Path) -> None:
    weights = load_file(file)
    weights["model.diffusion_model.out.0.weight"][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ValueError, match="unet of model .* must have finite weights"):
        load_model(file, "cpu")


def test_other_files_are_refused_before_anything_is_loaded(file: Path, tmp_path: Path) -> None:
    pipeline = micro_pipeline()
    (tmp_path / "old.ckpt").write_bytes(b"pickled")
    with pytest.raises(ValueError, match=r"not the pickle .*old\.ckpt.*from_single_file\(.*save_pretrained"):
        check_source(tmp_path / "old.ckpt")
    lora = save_kohya_lora(tmp_path / "style.safetensors", pipeline.unet)
    with pytest.raises(ValueError, match=r"style\.safetensors' is a LoRA.*lora='"):
        check_source(lora)
    save_file(pipeline.unet.state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"whole pipeline .*conv_in.*one network .*save_pretrained"):
        check_source(tmp_path / "unet.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged\.safetensors' is none"):
        check_source(tmp_path / "damaged.safetensors")


@pytest.mark.parametrize(
    ("telling", "likely"),
    [
        ("model.diffusion_model.out.2.bias", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", "stabilityai/stable-diffusion-xl"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "black-forest-labs/FLUX.1"),
    ],
)
def test_configurations_that_are_missing_are_named_with_the_command_that_gets_them(
    telling: str, likely: str, tmp_path: Path
) -> None:
    save_file({telling: torch.ones(2)}, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=rf"folder '.*/alone'.*: hf download {likely}") as error:
        check_source(tmp_path / "alone.safetensors")
    options = r" --include '\*.json' --include '\*.txt' --include '\*.model' --local-dir .*/alone$"  # one pattern each
    assert re.search(options, str(error.value))
