"""Guidance whose halves are one until the text comes in: the same outputs and gradients, with fewer rows."""

import pytest
import torch
from micro_agents import micro_env, micro_policy, stir
from micro_families import micro_family

from agents.shared_start import share_start


def observation(env, rows=3):
    torch.manual_seed(5)
    latents = torch.randn(rows, *env.model.latent_shape)
    conditioning = env.model.encode_prompts(["a cat", "a dog", "a fox"][:rows])
    return latents, torch.tensor([801.0, 401.0, 1.0])[:rows], conditioning


def outputs_and_gradients(policy, given):
    policy.zero_grad()
    output = policy.predict_output(*given)
    output.sin().sum().backward()
    return output, {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("targets", ["attention", "attention+convolutions"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_outputs_and_gradients_are_those_of_two_halves(micro_pipeline_folder, targets, gradient_checkpointing):
    env = micro_env(micro_pipeline_folder)
    settings = {"lora_targets": targets, "gradient_checkpointing": gradient_checkpointing}
    policy = stir(micro_policy(env, guidance_scale=3.0, **settings))
    assert policy.shared_start
    found = []
    for shared in (True, False):
        policy.shared_start = shared
        found.append(outputs_and_gradients(policy, observation(env)))
    (mine, gradients), (expected, others) = found
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-4, msg=name)


def test_rows_double_where_the_text_comes_in(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder)
    policy = micro_policy(env, guidance_scale=3.0)
    rows = {}
    for name in ("conv_in", "conv_out"):
        layer = getattr(policy.denoiser, name)
        layer.register_forward_hook(lambda _, given, __, name=name: rows.update({name: given[0].shape[0]}))
    with torch.no_grad():
        policy.predict_output(*observation(env))
    assert rows == {"conv_in": 3, "conv_out": 6}


@pytest.mark.parametrize("settings", [{"guidance_scale": 1.0}, {"compile_denoiser": True, "guidance_scale": 3.0}])
def test_without_guidance_or_compiled_nothing_is_shared(micro_pipeline_folder, settings):
    assert not micro_policy(micro_env(micro_pipeline_folder), **settings).shared_start


def test_a_guided_half_alone_is_what_it_was(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder)
    policy = stir(micro_policy(env, guidance_scale=3.0, unconditional_gradient=False))
    both = stir(micro_policy(env, guidance_scale=3.0))
    with torch.no_grad():
        torch.testing.assert_close(policy.predict_output(*observation(env)), both.predict_output(*observation(env)))


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "stable_diffusion_3", "flux_dev", "ddpm"])
def test_other_families_are_left_alone(family):
    pipeline = micro_family(family)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    assert not share_start(denoiser)
    assert not any(module._forward_pre_hooks for module in denoiser.modules())
