"""FLUX.1 watched, against its pipeline: packed latents, shifted times, guidance as an input or not."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from helpers.micro_agents import micro_env, micro_policy, train_a_step, weights
from helpers.micro_families import micro_family

from agents.rollout.buffer import Transitions
from ddpo_env.models.loading import load_model

PROMPTS = ["a cat", "a blue horse"]


@pytest.fixture(scope="module")
def dev() -> FluxPipeline:
    return micro_family("flux_dev")


@pytest.fixture(scope="module")
def schnell() -> FluxPipeline:
    return micro_family("flux_schnell")


def test_conditioning_is_t5s_and_clips_pooled_output(dev: FluxPipeline) -> None:
    model = load_model(dev, "cpu")
    embeds, pooled, text_ids = dev.encode_prompt(PROMPTS)
    mine = model.encode_prompts(PROMPTS)
    torch.testing.assert_close(mine, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})
    assert not text_ids.any()
    assert model.conditioning_shapes == {"prompt_embeds": (512, 32), "pooled_prompt_embeds": (16,)}


def test_size_is_the_vaes_and_latents_are_packed_as_the_pipeline_packs_them(dev: FluxPipeline) -> None:
    model: Any = load_model(dev, "cpu")
    assert model.size == (32, 32), "FLUX.1's published VAE has a sample_size of 1024"
    assert model.latent_shape == dev._pack_latents(torch.zeros(1, 4, 8, 8), 1, 4, 8, 8).shape[1:]
    latents = torch.randn(2, 4, 8, 8)
    scaled = latents / dev.vae.config.scaling_factor + dev.vae.config.shift_factor
    with torch.no_grad():
        images = dev.image_processor.postprocess(dev.vae.decode(scaled).sample, output_type="np")
    decoded = model.decode(dev._pack_latents(latents, 2, 4, 8, 8)).numpy()
    assert np.abs(decoded - (images * 255).round()).max() <= 1


@pytest.mark.parametrize("family", ["flux_dev", "flux_schnell"])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_flow_times_are_the_pipelines(family: str, steps: int) -> None:
    pipeline = micro_family(family)
    config = pipeline.scheduler.config
    mu = calculate_shift(16, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    pipeline.scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    env = micro_env(pipeline, num_inference_steps=steps)
    assert torch.equal(micro_policy(env).sampler.timesteps, pipeline.scheduler.timesteps)
    assert env.reset(seed=0)[0]["timestep"][0] == pipeline.scheduler.timesteps[0] == 1000


def calls(policy: Any) -> list[dict[str, Any]]:
    """What the policy's denoiser will be called with."""
    seen: list[dict[str, Any]] = []
    policy.denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_guidance_is_an_input_of_the_distilled_model_and_the_denoiser_is_called_once(
    dev: FluxPipeline, scale: float
) -> None:
    env = micro_env(dev, num_envs=3)
    policy = micro_policy(env, guidance_scale=scale)
    seen = calls(policy)
    observation, _ = env.reset(seed=0)
    policy(observation)
    assert len(seen) == 1
    assert seen[0]["guidance"].tolist() == [scale] * 3
    assert len(seen[0]["hidden_states"]) == 3
    other = micro_policy(env, guidance_scale=scale + 1)
    with torch.no_grad():
        assert not torch.equal(*(one.get_distribution(observation).mean for one in (policy, other)))


def test_without_that_input_guidance_is_classifier_free(schnell: FluxPipeline) -> None:
    env = micro_env(schnell, num_envs=3)
    for scale, rows in ((1.0, 3), (2.0, 6)):
        policy = micro_policy(env, guidance_scale=scale)
        seen = calls(policy)
        policy(env.reset(seed=0)[0])
        assert [len(call["hidden_states"]) for call in seen] == [rows]
        assert seen[0]["guidance"] is None


def test_adapters_are_on_the_attention_of_the_image_and_of_the_text(dev: FluxPipeline) -> None:
    adapted = {name for name in weights(micro_policy(micro_env(dev), lora_targets="attention")) if "lora_A" in name}
    both = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    expected = {f"transformer_blocks.0.attn.{name}" for name in both}
    expected |= {f"single_transformer_blocks.0.attn.{name}" for name in both[:3]}
    assert {name.removeprefix("denoiser.").partition(".lora_A")[0] for name in adapted} == expected


def test_guidance_that_nobody_gave_is_an_error(dev: FluxPipeline) -> None:
    model = load_model(dev, "cpu")
    with pytest.raises(ValueError, match=r"conditioning must have guidance, .*3\.5.*got prompt_embeds, pooled"):
        model.predict(model.denoiser, torch.randn(1, 16, 16), torch.tensor([1000.0]), model.encode_prompts(["a cat"]))


def test_denoising_loss_has_the_guidance_too(dev: FluxPipeline) -> None:
    env = micro_env(dev, num_envs=3)
    policy = micro_policy(env, guidance_scale=3.5)
    seen = calls(policy)
    observation, _ = env.reset(seed=0)
    unused = torch.zeros(3)
    batch = Transitions(observation, observation["latents"], unused, unused, unused, unused)
    loss = policy.regression_loss(batch)
    assert loss.shape == (3,)
    assert seen[0]["guidance"].tolist() == [3.5] * 3
    assert seen[0]["guidance"].dtype == torch.float32


def test_gradient_checkpointing_and_half_precision_train_it(dev: FluxPipeline) -> None:
    env = micro_env(micro_family("flux_dev"), num_envs=2, dtype="bfloat16")
    policy = micro_policy(env, gradient_checkpointing=True, guidance_scale=3.5)
    policy.set_training_mode(True)
    before = weights(policy)
    train_a_step(policy, env.reset(seed=0)[0])
    assert any(not torch.equal(value, before[name]) for name, value in weights(policy).items())
