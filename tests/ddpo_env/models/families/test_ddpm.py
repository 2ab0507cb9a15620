"""Unconditional DDPM: no prompt, no decoder, a clipping scheduler, and a LoRA in peft's own format."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.micro_agents import STEPS, micro_config, micro_env, micro_policy, stir
from helpers.micro_families import micro_family
from peft import PeftModel

from agents.training.preparation import run_training
from ddpo_env.models.loading import load_model

SETTINGS = {"guidance_scale": 1.0, "min_std": 0.02}


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_step_is_the_schedulers_own_clipping_included(variance_type: str) -> None:
    pipeline = micro_family("ddpm", variance_type=variance_type)
    env = micro_env(pipeline, num_envs=2)
    policy = micro_policy(env, **SETTINGS)
    observation, _ = env.reset(seed=0, options={"latents": 3 * torch.randn(2, *env.model.latent_shape)})
    pipeline.scheduler.set_timesteps(env.num_inference_steps)
    timestep = pipeline.scheduler.timesteps[0]
    latents = observation["latents"]
    with torch.no_grad():
        distribution = policy.get_distribution(observation)
        output = pipeline.unet(latents, timestep).sample
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed(5)
        expected = pipeline.scheduler.step(output, timestep, latents, generator=generator).prev_sample
    x0 = policy.sampler.predict_x0(latents, output, torch.zeros(2, dtype=torch.long))
    assert x0.abs().max() == 1, "the step must clip for this test to mean anything"
    torch.testing.assert_close(distribution.mean + policy.sampler.std[0] * noise, expected, rtol=1e-4, atol=1e-5)


def test_nothing_conditions_it() -> None:
    env = micro_env(micro_family("ddpm"), num_envs=2)
    observation, infos = env.reset(seed=0, options={"prompts": ["a cat", "a dog"]})
    assert set(observation) == {"latents", "timestep"}
    assert list(infos["prompt"]) == ["a cat", "a dog"], "prompts are names for the rewards and the advantages alone"
    with pytest.raises(ValueError, match=r"guidance_scale must be 1 with model .* no conditioning for guidance; got 2"):
        micro_policy(env, **SETTINGS | {"guidance_scale": 2.0})


def test_its_last_step_has_no_noise_unless_it_is_given_some() -> None:
    env = micro_env(micro_family("ddpm"), num_envs=2)
    plain, noisy = (micro_policy(env, guidance_scale=1.0, min_std=least) for least in (None, 0.02))
    assert plain.sampler.is_stochastic.tolist() == [True] * (STEPS - 1) + [False]
    assert noisy.sampler.is_stochastic.all()


@pytest.mark.parametrize("channels", [1, 3])
def test_image_is_the_pipelines(channels: int) -> None:
    pipeline = micro_family("ddpm", channels=channels)
    latents = torch.randn(2, channels, 16, 16)
    images = load_model(pipeline, "cpu").decode(latents).numpy()
    expected = [np.asarray(image.convert("RGB")) for image in pipeline.numpy_to_pil(
        (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    )]  # fmt: skip
    assert np.array_equal(images, expected)


def test_lora_comes_back_merged_or_not(tmp_path: Path) -> None:
    pipeline = micro_family("ddpm")
    env = micro_env(pipeline, num_envs=2)
    policy = stir(micro_policy(env, **SETTINGS))
    policy.save_lora(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    latents, timestep = torch.randn(2, *env.model.latent_shape), torch.tensor([500, 3])
    with torch.no_grad():
        expected = env.model.predict(policy.denoiser, latents, timestep, {})
        adapted = PeftModel.from_pretrained(micro_family("ddpm").unet, tmp_path)
        torch.testing.assert_close(adapted(latents, timestep).sample, expected, rtol=0, atol=1e-5)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(latents, timestep).sample, expected, rtol=0, atol=1e-3)
    assert type(merged) is type(pipeline.unet)


def test_run_trains_it_and_leaves_the_adapter(tmp_path: Path) -> None:
    micro_family("ddpm").save_pretrained(tmp_path / "ddpm")
    config = micro_config(
        tmp_path / "ddpm",
        tmp_path / "run",
        **SETTINGS,
        iterations=1,
        eval_interval=0,
        advantage="batch",
    )
    run_training(config)
    adapted = PeftModel.from_pretrained(micro_family("ddpm").unet, tmp_path / "run" / "lora")
    assert any(value.any() for name, value in adapted.named_parameters() if "lora_B" in name)


def test_unet_without_attention_says_which_layers_to_train() -> None:
    pipeline = micro_family("ddpm", attention=False)
    env = micro_env(pipeline, num_envs=2)
    with pytest.raises(ValueError, match="lora_targets='attention' matches no layer"):
        micro_policy(env, lora_targets="attention", **SETTINGS)
    micro_policy(env, lora_targets="attention+convolutions", **SETTINGS)
