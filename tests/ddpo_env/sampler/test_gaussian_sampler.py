"""The Gaussian step: densities against torch.distributions, batches of different timesteps, storage and rounding."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from helpers.sampler_inputs import SHAPE, STABLE_DIFFUSION, normals

from ddpo_env.sampler.gaussian_sampler import GaussianSampler


@pytest.fixture
def sampler():
    return GaussianSampler.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION), 10)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), SHAPE, (2, 3, 4, 5)])
def test_log_prob_and_kl_equal_torch_distributions(sampler, shape):
    next_latents, mean, reference = normals(9, 3, batch=10, shape=shape)
    rows = torch.arange(10)
    next_latents = mean + next_latents * sampler.std.reshape(-1, *[1] * len(shape))
    std = sampler.std.reshape(-1, *[1] * len(shape)).double()
    policy = torch.distributions.Normal(mean.double(), std)
    density = policy.log_prob(next_latents.double()).reshape(10, -1)
    divergence = torch.distributions.kl_divergence(policy, torch.distributions.Normal(reference.double(), std))
    divergence = divergence.reshape(10, -1)
    for reduction in ("mean", "sum"):
        log_prob = sampler.log_prob(next_latents, mean, rows, reduction)
        kl = sampler.kl_divergence(mean, reference, rows, reduction)
        assert log_prob.shape == kl.shape == (10,)
        assert log_prob.dtype == kl.dtype == torch.float32
        torch.testing.assert_close(log_prob.double(), getattr(density, reduction)(1), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(kl.double(), getattr(divergence, reduction)(1), rtol=1e-5, atol=1e-6)


def test_reduction_defaults_to_the_mean(sampler):
    next_latents, mean = normals(10, 2, batch=1)
    rows = torch.tensor([3])
    assert torch.equal(sampler.log_prob(next_latents, mean, rows), sampler.log_prob(next_latents, mean, rows, "mean"))
    with pytest.raises(ValueError, match="reduction must be mean or sum; got 'max'"):
        sampler.log_prob(next_latents, mean, rows, "max")


def test_different_timesteps_in_a_batch_equal_one_by_one():
    scheduler = DDIMScheduler(**STABLE_DIFFUSION | {"clip_sample": True})
    sampler = GaussianSampler.from_scheduler(scheduler, 10)
    rows = torch.tensor([7, 0, 9, 3, 3])
    latents, output, noise = normals(11, 3, batch=5)
    together, mean = sampler.sample(latents, output, rows, noise)
    score = sampler.log_prob(together, mean, rows)
    for index in range(5):
        own = slice(index, index + 1)
        alone, own_mean = sampler.sample(latents[own], output[own], rows[own], noise[own])
        assert torch.equal(together[own], alone)
        torch.testing.assert_close(score[own], sampler.log_prob(alone, own_mean, rows[own]), rtol=1e-6, atol=1e-6)


def test_timesteps_and_rows_round_trip(sampler):
    for table in (sampler, GaussianSampler.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 28)):
        rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
        assert torch.equal(table.step_index_of(table.timesteps[rows]), rows)
        assert torch.equal(table.step_index_of(table.timesteps[rows].float()), rows)


def test_unknown_timestep_is_an_error_that_names_it(sampler):
    with pytest.raises(ValueError, match=r"timestep must be one of \[901, .*; got \[500\] \(does a wrapper"):
        sampler.step_index_of(torch.tensor([901, 500]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scored_action_is_the_stored_action(sampler, dtype):
    latents, output, noise = (tensor.to(dtype) for tensor in normals(12, 3, batch=10))
    rows = torch.arange(10)
    next_latents, mean = sampler.sample(latents, output, rows, noise)
    assert next_latents.dtype == mean.dtype == torch.float32
    assert torch.equal(mean, sampler.mean(latents.float(), output.float(), rows))
    stored = next_latents.to(dtype)
    scored = sampler.log_prob(stored, mean, rows)
    assert torch.equal(scored, sampler.log_prob(stored.float(), mean, rows))
    rounding = (scored - sampler.log_prob(next_latents, mean, rows)).abs()
    assert rounding.max() > 1e-6, "rounding must matter for this test to mean anything"


def test_gradient_of_log_prob_reaches_the_model_output(sampler):
    latents, output, noise = normals(13, 3, batch=10)
    rows = torch.arange(10)
    next_latents, _ = sampler.sample(latents, output, rows, noise)
    output.requires_grad_()
    sampler.log_prob(next_latents, sampler.mean(latents, output, rows), rows, "sum").sum().backward()
    coefficient = (sampler.output_to_mean / sampler.std).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(output.grad, noise * coefficient, rtol=1e-3, atol=1e-3)


def test_moved_table_is_the_same_table(sampler):
    moved = sampler.to("cpu")
    assert torch.equal(moved.std, sampler.std)
    assert moved.clip_sample_range == sampler.clip_sample_range


def test_flow_step_of_a_diffusion_is_that_of_eulers_method_in_scaled_latents():
    """x / (signal + sigma) of DDIM without noise moves along the flow's velocity, by the fall of its time."""
    scheduler = DDIMScheduler(**STABLE_DIFFUSION)
    sampler = GaussianSampler.from_scheduler(scheduler, 10, eta=0.0)
    alpha = scheduler.alphas_cumprod.double()[sampler.timesteps]
    following = torch.cat([alpha[1:], scheduler.final_alpha_cumprod.double()[None]])
    clean, noise = normals(12, 2, batch=10)
    scaled = [a.sqrt() + (1 - a).sqrt() for a in (alpha, following)]
    column = (-1, *[1] * (clean.ndim - 1))
    signal, sigma = (value.sqrt().view(column) for value in (alpha, 1 - alpha))
    latents = (signal * clean + sigma * noise).float()
    after = sampler.mean(latents, noise, torch.arange(10)) / scaled[1].view(column)
    expected = latents / scaled[0].view(column) - sampler.flow_step.view(column) * (noise - clean)
    torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-4)
    flow = GaussianSampler.from_scheduler(FlowMatchEulerDiscreteScheduler(), 10)
    sigmas = torch.cat([flow.timesteps / 1000, torch.zeros(1)])
    torch.testing.assert_close(flow.flow_step, -sigmas.diff())


def test_hand_made_table_is_checked():
    column = torch.ones(3)
    for std in (-column, 1e-6 * column):
        with pytest.raises(ValueError, match="std must be 0 or at least"):
            GaussianSampler(torch.arange(3), column, column, column, column, column, std, column, 1.0)
    with pytest.raises(ValueError, match="x0_to_mean must be finite"):
        GaussianSampler(torch.arange(3), column, column, column, column, column * math.nan, column, column, 1.0)
    with pytest.raises(ValueError, match=r"std must have one value per step, \(3,\); got \(2,\)"):
        GaussianSampler(torch.arange(3), column, column, column, column, column, torch.ones(2), column, 1.0)
    with pytest.raises(ValueError, match="x0_to_mean must be 0 if the scheduler does not clip"):
        GaussianSampler(torch.arange(3), column, column, column, column, column, column, column)
