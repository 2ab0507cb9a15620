"""SDXL's adapter against its pipeline: conditioning, guidance, the UNet's other inputs, the VAE's precision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from helpers.micro_agents import micro_env, micro_policy
from helpers.micro_families import micro_family

from ddpo_env.models.families.pipeline_model import PipelineModel
from ddpo_env.models.loading import load_model

PROMPTS = ["a cat", "a blue horse"]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return micro_family("stable_diffusion_xl")


@pytest.fixture(scope="module")
def model(pipeline: StableDiffusionXLPipeline) -> PipelineModel:
    loaded = load_model(pipeline, "cpu")
    assert isinstance(loaded, PipelineModel)
    return loaded


def test_conditioning_is_that_of_both_encoders(model: PipelineModel, pipeline: StableDiffusionXLPipeline) -> None:
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, negative_prompt=["a dog", "a fox"])
    mine = model.encode_prompts(PROMPTS)
    torch.testing.assert_close(mine, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})
    mine = model.encode_prompts(["a dog", "a fox"])
    torch.testing.assert_close(mine, {"prompt_embeds": negative, "pooled_prompt_embeds": negative_pooled})
    assert model.conditioning_shapes == {name: tuple(tensor.shape[1:]) for name, tensor in mine.items()}


@pytest.mark.parametrize("zeros", [True, False])
def test_guidance_leads_away_from_what_the_pipeline_leads_away_from(zeros: bool) -> None:
    pipeline = micro_family("stable_diffusion_xl", force_zeros_for_empty_prompt=zeros)
    _, negative, _, negative_pooled = pipeline.encode_prompt("a cat")
    policy = micro_policy(micro_env(pipeline, num_envs=1))
    assert torch.equal(policy.negative_conditioning["prompt_embeds"], negative)
    assert torch.equal(policy.negative_conditioning["pooled_prompt_embeds"], negative_pooled)
    assert bool(negative.any()) != zeros


def test_guided_step_is_the_schedulers_own(model: PipelineModel, pipeline: StableDiffusionXLPipeline) -> None:
    env = micro_env(pipeline, num_envs=2)
    policy = micro_policy(env, guidance_scale=3.0, eta=0.6)
    observation, _ = env.reset(seed=0, options={"prompts": PROMPTS})
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS)
    sizes = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, pooled.shape[1])
    added = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": sizes.repeat(4, 1)}
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(env.num_inference_steps)
    timestep, latents = scheduler.timesteps[0], observation["latents"]
    with torch.no_grad():
        output = pipeline.unet(
            torch.cat([latents] * 2), timestep, torch.cat([negative, embeds]), added_cond_kwargs=added
        ).sample
        unconditional, conditional = output.chunk(2)
        guided = unconditional + 3.0 * (conditional - unconditional)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
        expected = scheduler.step(guided, timestep, latents, eta=0.6, variance_noise=noise).prev_sample
        distribution = policy.get_distribution(observation)
    mine = distribution.mean + policy.sampler.std[0] * noise
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_sizes_matter_to_the_unet(model: PipelineModel) -> None:
    latents, timestep = torch.randn(1, 4, 8, 8), torch.tensor([801])
    conditioning = model.encode_prompts(["a cat"])
    with torch.no_grad():
        output = model.predict(model.denoiser, latents, timestep, conditioning)
        for name in conditioning:
            other = conditioning | {name: conditioning[name] + 1}
            assert not torch.equal(model.predict(model.denoiser, latents, timestep, other), output)


def test_image_is_the_pipelines(model: PipelineModel, pipeline: StableDiffusionXLPipeline) -> None:
    latents = torch.randn(2, 4, 8, 8)
    pipeline.vae.register_to_config(latents_mean=[0.1, 0.2, -0.1, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    try:
        images = model.decode(latents)
        config = pipeline.vae.config
        mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        with torch.no_grad():
            image = pipeline.vae.decode(latents * std / config.scaling_factor + mean).sample
    finally:
        pipeline.vae.register_to_config(latents_mean=None, latents_std=None)
    expected = (pipeline.image_processor.postprocess(image, output_type="np") * 255).round()
    assert np.abs(images.numpy() - expected).max() <= 1


@pytest.mark.parametrize(("dtype", "decoded_in"), [("float16", torch.float32), ("bfloat16", torch.bfloat16)])
def test_vae_that_overflows_in_half_precision_decodes_in_single(
    tmp_path: Path, dtype: str, decoded_in: torch.dtype
) -> None:
    model: Any = load_model(micro_family("stable_diffusion_xl"), "cpu", dtype)
    seen: list[torch.dtype] = []
    model.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert model.decode(torch.randn(1, 4, 8, 8)).dtype == torch.uint8
    assert seen == [decoded_in]
    assert model.denoiser.dtype == getattr(torch, dtype)


def test_half_precision_hands_single_precision_to_the_environment() -> None:
    model = load_model(micro_family("stable_diffusion_xl"), "cpu", "bfloat16")
    conditioning = model.encode_prompts(["a cat"])
    assert {tensor.dtype for tensor in conditioning.values()} == {torch.float32}
    negative = model.negative_conditioning()  # type: ignore[attr-defined]
    assert {tensor.dtype for tensor in negative.values()} == {torch.float32}
