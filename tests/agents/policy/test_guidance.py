"""The two halves of guidance: one call or two, with and without the unconditional one's gradient."""

import pytest
import torch
from helpers.algorithms import collected, denoising_ppo, logged
from helpers.micro_agents import micro_env, micro_policy, stir

SCALE = 3.0


def means(policy, observation):
    return policy.get_distribution(observation).mean


@pytest.fixture
def observation(micro_pipeline_folder):
    return micro_env(micro_pipeline_folder).reset(seed=0)[0]


def test_the_output_is_the_same_and_the_gradient_is_the_conditional_halfs(micro_pipeline_folder, observation):
    env = micro_env(micro_pipeline_folder)
    both, conditional = (
        stir(micro_policy(env, guidance_scale=SCALE, unconditional_gradient=choice)) for choice in (True, False)
    )
    torch.testing.assert_close(means(both, observation), means(conditional, observation), rtol=1e-5, atol=1e-5)
    gradients = []
    for policy in (both, conditional):
        means(policy, observation).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in policy.trainable_parameters()]))
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm(), "the unconditional half has a say"

    # By hand: hold the unconditional output fixed.
    policy = stir(micro_policy(env, guidance_scale=SCALE))
    latents, timestep, prompts = policy._split(observation)
    negative = {name: policy.negative_conditioning[name].expand_as(value) for name, value in prompts.items()}
    unconditional = policy._predict_with(policy.denoiser, latents, timestep, negative).detach()
    output = unconditional + SCALE * (policy._predict_with(policy.denoiser, latents, timestep, prompts) - unconditional)
    steps = policy.sampler.step_index_of(timestep)
    policy.sampler.mean(latents, output, steps).square().mean().backward()
    by_hand = torch.cat([weight.grad.flatten() for weight in policy.trainable_parameters()])
    torch.testing.assert_close(gradients[1], by_hand, rtol=1e-4, atol=1e-6)


def test_the_ratio_starts_at_1_all_the_same(micro_pipeline_folder):
    policy = {"unconditional_gradient": False, "guidance_scale": SCALE}
    model = denoising_ppo(micro_pipeline_folder, micro_batch_size=7, policy=policy)
    stir(model.policy, 0.02)
    collected(model).train()
    assert logged(model)["train/ratio_deviation"] <= 1e-5
