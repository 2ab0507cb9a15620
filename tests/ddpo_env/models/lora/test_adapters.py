"""LoRAs that a model starts from mean what they mean to stock diffusers, whoever wrote them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers.lora_files import layers_of, random_tensors, save_diffusers_lora, save_kohya_lora
from helpers.micro_agents import STEPS, micro_env, micro_policy, stir
from helpers.micro_families import micro_family
from helpers.micro_pipeline import HIDDEN, micro_pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from agents.evaluation.sample import SampleArguments, generate
from agents.policy.diffusion_policy import DiffusionPolicy
from ddpo_env.models import abilities_of, load_model

PROMPTS = ["a cat", "a fox"]
HEADER = LoraConfig(r=3, lora_alpha=6, init_lora_weights="gaussian", target_modules=["to_q", "to_out.0", "conv1"])
KINDS = ["diffusers", "a header with alpha", "kohya", "a run"]


def write(kind: str, folder: Path, model: Path) -> Path:
    """Write a LoRA that adapts the UNet alone."""
    unet = micro_pipeline().unet
    if kind == "diffusers":
        return save_diffusers_lora(folder / "plain.safetensors", {"unet": unet})
    if kind == "a header with alpha":
        header = {f"unet.{name}": value for name, value in HEADER.to_dict().items() if not isinstance(value, set)}
        text = json.dumps(header | {"unet.target_modules": sorted(HEADER.target_modules or [])})
        return save_diffusers_lora(folder / "alpha.safetensors", {"unet": unet}, lora_adapter_metadata=text)
    if kind == "kohya":
        return save_kohya_lora(folder / "kohya.safetensors", unet)
    stir(micro_policy(micro_env(model))).save_lora(folder / "lora")
    return folder / "lora" / "pytorch_lora_weights.safetensors"


def stock(model: Path, *files: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for number, file in enumerate(files):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=str(number))
    if files:
        pipeline.set_adapters([str(number) for number in range(len(files))])
    return pipeline


def image_of_policy(policy: DiffusionPolicy, model: Any) -> np.ndarray:
    env = micro_env(model, num_envs=1)
    latents = torch.randn(1, *env.model.latent_shape, generator=torch.Generator().manual_seed(4))
    observation, _ = env.reset(options={"prompts": "a cat", "latents": latents})
    torch.manual_seed(11)
    for _ in range(STEPS):
        with torch.no_grad():
            observation, _, _, _, infos = env.step(policy(observation)[0])
    return infos["final_info"]["image"][0].astype(int)


def image_of_pipeline(pipeline: StableDiffusionPipeline) -> np.ndarray:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(11)
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "eta": 1.0, "output_type": "np"}
    return np.asarray((pipeline("a cat", latents=latents, **options).images[0] * 255).round()).astype(int)


def outputs(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, prompts = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 12, HIDDEN, generator=generator)
    with torch.no_grad():
        output: torch.Tensor = unet(latents, torch.tensor([801.0, 1.0]), prompts).sample
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_policy_goes_on_from_what_stock_diffusers_reads_and_saves_it(
    kind: str, micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    file = write(kind, tmp_path, micro_pipeline_folder)
    env = micro_env(micro_pipeline_folder)
    policy = micro_policy(env, lora=file if kind != "a run" else file.parent)
    theirs = stock(micro_pipeline_folder, file).unet
    assert torch.equal(outputs(policy.denoiser), outputs(theirs))
    assert (outputs(theirs) - outputs(env.model.denoiser)).abs().max() > 0.1
    learning = {name: value for name, value in policy.denoiser.named_parameters() if value.requires_grad}
    assert {value.dtype for value in learning.values()} == {torch.float32}
    assert {(name, tuple(value.shape)) for name, value in learning.items()} == {
        (name.replace(".0.weight", ".default.weight"), tuple(value.shape))
        for name, value in theirs.named_parameters()
        if ".lora_" in name
    }
    policy.save_lora(tmp_path / "again")
    again = stock(micro_pipeline_folder, tmp_path / "again" / "pytorch_lora_weights.safetensors").unet
    assert torch.equal(outputs(again), outputs(theirs))


def test_image_before_training_is_that_of_the_stock_pipeline_with_the_lora(
    micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    file = write("kohya", tmp_path, micro_pipeline_folder)
    policy = micro_policy(micro_env(micro_pipeline_folder), lora=file)
    theirs = image_of_pipeline(stock(micro_pipeline_folder, file))
    assert np.abs(image_of_policy(policy, micro_pipeline_folder) - theirs).max() <= 1
    assert np.abs(theirs - image_of_pipeline(stock(micro_pipeline_folder))).max() > 5


def test_policy_that_goes_on_is_saved_and_loaded_without_the_first_file(
    micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    file = write("kohya", tmp_path, micro_pipeline_folder)
    policy = stir(micro_policy(micro_env(micro_pipeline_folder), lora=file))
    policy.save(tmp_path / "policy")
    file.unlink()
    loaded = DiffusionPolicy.load(tmp_path / "policy", "cpu")
    assert loaded.state_dict().keys() == policy.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in policy.state_dict().items())


def test_merged_lora_is_the_model_with_its_text_encoder_and_part_of_what_is_saved(
    micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    pipeline = micro_pipeline()
    base = save_kohya_lora(tmp_path / "base.safetensors", pipeline.unet, pipeline.text_encoder)
    model: Any = load_model(micro_pipeline_folder, "cpu", base_lora=base)
    theirs = stock(micro_pipeline_folder, base)
    fresh = micro_policy(micro_env(model))
    assert np.abs(image_of_policy(fresh, model) - image_of_pipeline(theirs)).max() <= 1
    encoded = theirs.encode_prompt("a cat", "cpu", 1, False)[0]
    torch.testing.assert_close(model.encode_prompts(["a cat"])["prompt_embeds"], encoded.detach(), rtol=1e-5, atol=1e-5)
    policy = stir(fresh)
    policy.save_lora(tmp_path / "lora")
    both = stock(micro_pipeline_folder, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert np.abs(image_of_policy(policy, model) - image_of_pipeline(both)).max() <= 1
    assert np.abs(image_of_pipeline(both) - image_of_pipeline(theirs)).max() > 5
    settings = {"prompts": ("a cat",), "seeds": (0,), "num_inference_steps": 2, "device": "cpu"}
    generate(SampleArguments(model=str(micro_pipeline_folder), lora=tmp_path / "lora", **settings))  # type: ignore[arg-type]


def test_model_without_the_merged_lora_and_saved_policies_are_apart(
    micro_pipeline_folder: Path, tmp_path: Path
) -> None:
    base = write("diffusers", tmp_path, micro_pipeline_folder)
    plain, merged = load_model(micro_pipeline_folder, "cpu"), load_model(micro_pipeline_folder, "cpu", base_lora=base)
    assert load_model(micro_pipeline_folder, "cpu", base_lora=str(base)) is merged
    assert load_model(merged.source, "cpu") is merged
    large = load_model(merged, resolution=64)
    assert large.denoiser is merged.denoiser
    assert large.merged_lora is merged.merged_lora  # type: ignore[attr-defined]
    name = next(iter(layers_of(plain.denoiser, "to_q"))) + ".weight"
    assert torch.equal(plain.denoiser.state_dict()[name], micro_pipeline().unet.state_dict()[name])
    assert not torch.equal(plain.denoiser.state_dict()[name], merged.denoiser.state_dict()[name])
    micro_policy(micro_env(merged)).save(tmp_path / "policy")
    assert DiffusionPolicy.load(tmp_path / "policy", "cpu").model is merged
    base.unlink()
    with pytest.raises(ValueError, match=r"cannot load model .*base_lora must be a \.safetensors file"):
        DiffusionPolicy.load(tmp_path / "policy", "cpu")
    with pytest.raises(ValueError, match="base_lora must be None with a model that is an object"):
        load_model(plain, base_lora=base)


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "flux_dev"])
def test_other_families_go_on_from_what_they_saved(family: str, tmp_path: Path) -> None:
    micro_family(family).save_pretrained(tmp_path / "model")
    env = micro_env(tmp_path / "model", num_envs=1)
    options = {"lora_targets": "attention", "guidance_scale": 1.0}
    first = stir(micro_policy(env, **options))
    first.save_lora(tmp_path / "lora")
    second = micro_policy(env, lora=tmp_path / "lora", **options)
    assert second.state_dict().keys() == first.state_dict().keys()
    assert all(torch.equal(second.state_dict()[name], value) for name, value in first.state_dict().items())


def test_denoiser_without_a_pipeline_goes_on_from_peft_format(tmp_path: Path) -> None:
    micro_family("ddpm").save_pretrained(tmp_path / "model")
    env = micro_env(tmp_path / "model", num_envs=1)
    first = stir(micro_policy(env, lora_targets="attention+convolutions", guidance_scale=1.0, min_std=0.02))
    first.save_lora(tmp_path / "lora")
    second = micro_policy(env, lora=tmp_path / "lora", guidance_scale=1.0, min_std=0.02)
    assert all(torch.equal(second.state_dict()[name], value) for name, value in first.state_dict().items())


def test_text_encoder_in_a_lora_that_is_trained_further_is_refused(micro_pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = micro_pipeline()
    file = save_kohya_lora(tmp_path / "both.safetensors", pipeline.unet, pipeline.text_encoder)
    with pytest.raises(ValueError, match=r"must adapt the unet alone.* also adapts text_encoder\..*base_lora="):
        micro_policy(micro_env(micro_pipeline_folder), lora=file)


def damaged(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first, second = sorted(tensors)[:2]
    if kind == "a half":
        return {name: value for name, value in tensors.items() if name != second}
    if kind == "NaN":
        return tensors | {first: torch.full_like(tensors[first], torch.nan)}
    if kind == "an unknown layer":
        return tensors | random_tensors({"unet.no.such.lora_A.weight": (3, 8), "unet.no.such.lora_B.weight": (8, 3)})
    if kind == "a pattern":
        return tensors | {"unet.(((a+)+)+)+$.lora_B.weight": torch.ones(8, 2)}
    if kind == "another shape":
        return tensors | {first: tensors[first][:, :1].contiguous()}
    return {"unet.conv_in.weight": torch.ones(2)}


@pytest.mark.parametrize("kind", ["a half", "NaN", "an unknown layer", "a pattern", "another shape", "no LoRA"])
def test_damaged_loras_are_refused(kind: str, micro_pipeline_folder: Path, tmp_path: Path) -> None:
    file = save_diffusers_lora(tmp_path / "lora.safetensors", {"unet": micro_pipeline().unet})
    save_file(damaged(kind, load_file(file)), file)
    model = load_model(micro_pipeline_folder, "cpu")
    with pytest.raises(ValueError, match=r"lora.*lora\.safetensors'"):
        abilities_of(model).lora_adapters(file)
