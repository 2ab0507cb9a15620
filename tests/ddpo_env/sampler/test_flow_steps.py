"""DanceGRPO's and Flow-CPS's steps against their papers' formulas, written down again."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ddpo_env.sampler.gaussian_sampler import GaussianSampler


def normals(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4, 3, 2, generator=generator).double() for _ in range(count)]


def dance_step(latents, velocity, sigma, following, eta):
    """The reverse-time SDE of DanceGRPO (arXiv 2505.07818): Euler-Maruyama with the score at x0_hat."""
    clean = latents - sigma * velocity
    score = -(latents - (1 - sigma) * clean) / sigma**2
    step = following - sigma
    return latents + (velocity - eta**2 / 2 * score) * step, eta * math.sqrt(-step)


def cps_step(latents, velocity, sigma, following, eta):
    """Coefficients-preserving sampling (arXiv 2509.05952): noise of angle ηπ/2 replaces predicted noise."""
    clean, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
    std = following * math.sin(eta * math.pi / 2)
    return (1 - following) * clean + math.sqrt(following**2 - std**2) * noise, std


@pytest.mark.parametrize(("sampler", "formula", "default"), [("dance", dance_step, 0.3), ("cps", cps_step, 0.8)])
@pytest.mark.parametrize("noise_level", [None, 0.1, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 10, 28])
def test_step_equals_the_papers_formula(sampler, formula, default, noise_level, shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    table = GaussianSampler.from_scheduler(scheduler, steps, sampler=sampler, noise_level=noise_level)
    latents, velocity, noise = normals(0, 3)
    sigmas = scheduler.sigmas.double().tolist()
    assert sigmas[0] == 1
    for index in range(steps):
        expected, std = formula(latents, velocity, sigmas[index], sigmas[index + 1], noise_level or default)
        row = torch.tensor([index])
        actual, mean = table.sample(latents, velocity, row, noise)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actual.double(), expected + std * noise, rtol=1e-5, atol=1e-5)
        clean = latents - sigmas[index] * velocity
        torch.testing.assert_close(table.predict_x0(latents, velocity, row).double(), clean, rtol=1e-5, atol=1e-5)


def test_last_step_of_cps_has_no_noise_and_that_of_the_sdes_has():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    last = {
        name: GaussianSampler.from_scheduler(scheduler, 10, sampler=name).is_stochastic.tolist()
        for name in ("flow-sde", "dance", "cps")
    }
    assert last == {"flow-sde": [True] * 10, "dance": [True] * 10, "cps": [True] * 9 + [False]}


def test_flow_sde_is_the_default():
    scheduler = FlowMatchEulerDiscreteScheduler()
    default, named = (GaussianSampler.from_scheduler(scheduler, 5, sampler=name) for name in (None, "flow-sde"))
    assert torch.equal(default.std, named.std)
    assert torch.equal(default.sample_to_mean, named.sample_to_mean)


@pytest.mark.parametrize(
    ("shift", "sigmas"), [(1.18, None), (1.66, None), (1.18, [1.0, 0.6, 0.2]), (1.0, [0.99995, 0.6, 0.2])]
)
def test_flow_time_just_below_one_is_treated_as_one(shift, sigmas):
    """diffusers rounds the first flow time of some shifts to 0.99999994, where flow-sde would divide by 6e-8."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    options = {} if sigmas is None else {"sigmas": sigmas}
    scheduler.set_timesteps(3, **options)
    times = scheduler.sigmas.tolist()[:-1]
    assert 0.9999 < times[0] < 1
    table = GaussianSampler.from_scheduler(scheduler, 3, **options)
    exact = GaussianSampler.from_scheduler(FlowMatchEulerDiscreteScheduler(), 3, sigmas=[1.0, *times[1:]])
    for name in ("sample_to_mean", "output_to_mean", "std"):
        torch.testing.assert_close(getattr(table, name), getattr(exact, name), rtol=2e-4, atol=0)
