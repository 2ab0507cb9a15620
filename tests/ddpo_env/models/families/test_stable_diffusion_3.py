"""SD 3's adapter against its pipeline: three text encoders or two, Euler steps as the limit, shifted times, the VAE."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from helpers.micro_agents import STEPS, micro_config, micro_env, micro_policy
from helpers.micro_families import micro_family
from helpers.micro_pipeline import TOKENS
from helpers.paths import LORA_FILE

from agents.training.preparation import run_training
from ddpo_env import GaussianSampler
from ddpo_env.models.loading import load_model
from ddpo_env.sampler.flow_steps import NOISE_LEVELS

PROMPTS = ["a cat", "a blue horse"]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return micro_family("stable_diffusion_3")


@pytest.mark.parametrize(("family", "tokens"), [("stable_diffusion_3", 256), ("stable_diffusion_3.5", 256)])
def test_conditioning_is_that_of_all_encoders(family: str, tokens: int) -> None:
    pipeline = micro_family(family)
    model = load_model(pipeline, "cpu")
    negatives = ["a dog", ""]
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        PROMPTS, None, None, negative_prompt=negatives, max_sequence_length=tokens
    )
    for prompts, expected in ((PROMPTS, (embeds, pooled)), (negatives, (negative, negative_pooled))):
        mine = model.encode_prompts(prompts)
        torch.testing.assert_close(tuple(mine.values()), expected)
        assert {name: tuple(tensor.shape[1:]) for name, tensor in mine.items()} == model.conditioning_shapes
    assert embeds.shape[1] == TOKENS + tokens
    assert bool(embeds[:, TOKENS:].any()) == (family == "stable_diffusion_3"), "without T5 there are zeros"


def test_without_noise_a_step_is_the_schedulers_euler_step(pipeline: StableDiffusion3Pipeline) -> None:
    env = micro_env(pipeline, num_envs=2)
    policy = micro_policy(env, guidance_scale=3.0, noise_level=2e-3)
    observation, _ = env.reset(seed=0, options={"prompts": PROMPTS})
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(env.num_inference_steps)
    latents = observation["latents"]
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, None, None)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            mine = policy(observation, deterministic=True)[0]
            output = pipeline.transformer(
                hidden_states=torch.cat([latents] * 2),
                timestep=timestep.expand(4),
                encoder_hidden_states=torch.cat([negative, embeds]),
                pooled_projections=torch.cat([negative_pooled, pooled]),
            ).sample
        unconditional, conditional = output.chunk(2)
        guided = unconditional + 3.0 * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
        torch.testing.assert_close(mine, latents, rtol=1e-4, atol=1e-4)
        observation, *_ = env.step(mine)


def test_noise_level_is_the_policys_and_scales_the_noise(pipeline: StableDiffusion3Pipeline) -> None:
    env = micro_env(pipeline)
    default, half = (micro_policy(env, noise_level=level).sampler for level in (None, NOISE_LEVELS["flow-sde"] / 2))
    torch.testing.assert_close(half.std * 2, default.std)
    assert torch.equal(half.timesteps, default.timesteps)
    with pytest.raises(ValueError, match=r"noise_level must be in \[0, 10\]; got -0.1"):
        micro_policy(env, noise_level=-0.1)


def test_times_are_shifted_by_the_images_size_where_the_scheduler_says_so() -> None:
    pipeline = micro_family("stable_diffusion_3", use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    config = pipeline.scheduler.config
    mu = calculate_shift(16, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    pipeline.scheduler.set_timesteps(STEPS, mu=mu)
    env = micro_env(pipeline)
    sampler = GaussianSampler.from_model(env.model, STEPS)
    assert torch.equal(sampler.timesteps, pipeline.scheduler.timesteps)
    assert env.reset(seed=0)[0]["timestep"][0] == sampler.timesteps[0]
    assert sampler.timesteps[2] > 510, "shifted times are later than even ones"


def test_image_is_the_pipelines(pipeline: StableDiffusion3Pipeline) -> None:
    latents = torch.randn(2, 4, 8, 8)
    config = pipeline.vae.config
    assert config.shift_factor == 0.3
    with torch.no_grad():
        image = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    expected = (pipeline.image_processor.postprocess(image, output_type="np") * 255).round()
    assert np.abs(load_model(pipeline, "cpu").decode(latents).numpy() - expected).max() <= 1


def test_run_trains_it_with_a_noise_level(tmp_path: Path) -> None:
    folder = tmp_path / "sd3"
    micro_family("stable_diffusion_3").save_pretrained(folder)
    config = micro_config(folder, tmp_path / "run", noise_level=0.4, iterations=1)
    result = run_training(config)
    assert result.iterations == 1
    assert "noise_level: 0.4" in (tmp_path / "run" / "config.yaml").read_text()
    fresh = micro_family("stable_diffusion_3")
    fresh.load_lora_weights(tmp_path / "run" / "lora", weight_name=LORA_FILE)
    assert fresh.get_active_adapters()
    with pytest.raises(ValueError, match=r"noise_level must be in \[0, 10\]; got -0.4"):
        micro_config(folder, tmp_path / "no", noise_level=-0.4)
