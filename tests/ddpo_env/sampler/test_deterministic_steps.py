"""Steps without noise: they are the library's deterministic steps, go to their mean, and are never scored."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from helpers.sampler_inputs import STABLE_DIFFUSION, normals

from ddpo_env.sampler.gaussian_sampler import GaussianSampler
from ddpo_env.sampler.scheduler_table import ddim_of

STEPS = 10


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**STABLE_DIFFUSION),
        DDIMScheduler(**STABLE_DIFFUSION | {"prediction_type": "v_prediction", "clip_sample": True}),
        PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        DDPMScheduler(),
        DDPMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type="sample"),
    ],
    ids=["ddim", "velocity", "pndm", "ddpm", "ddpm_trailing"],
)
def test_ode_is_ddims_deterministic_step(scheduler):
    library = ddim_of(scheduler)
    library.set_timesteps(STEPS)
    sampler = GaussianSampler.from_scheduler(scheduler, STEPS, sampler="ode")
    assert sampler.timesteps.tolist() == library.timesteps.tolist()
    assert not sampler.std.any()
    latents, output, noise = normals(0, 3, batch=1)
    for index, timestep in enumerate(library.timesteps):
        expected = library.step(output, timestep, latents, eta=0.0).prev_sample
        mine, mean = sampler.sample(latents, output, torch.tensor([index]), noise)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(mine, mean)


@pytest.mark.parametrize("sampler", ["flow-sde", "dance", "cps", "ode"])
def test_flow_without_noise_is_eulers_step(sampler):
    library = FlowMatchEulerDiscreteScheduler(shift=3.0)
    library.set_timesteps(STEPS)
    level = {} if sampler == "ode" else {"noise_level": 0.0}
    table = GaussianSampler.from_scheduler(library, STEPS, sampler=sampler, **level)
    assert not table.std.any()
    latents, velocity, noise = normals(1, 3, batch=1)
    for index, timestep in enumerate(library.timesteps):
        expected = library.step(velocity, timestep, latents).prev_sample
        mine, _ = table.sample(latents, velocity, torch.tensor([index]), noise)
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_eta_by_step_gives_each_step_its_own_noise():
    scheduler = DDIMScheduler(**STABLE_DIFFUSION)
    etas = [0.0, 1.0, 0.5, 0.0, 0.3, 1.0, 1.0, 0.0, 0.7, 0.0]
    mixed = GaussianSampler.from_scheduler(scheduler, STEPS, etas)
    assert mixed.is_stochastic.tolist() == [eta > 0 for eta in etas]
    for index, eta in enumerate(etas):
        uniform = GaussianSampler.from_scheduler(scheduler, STEPS, eta)
        for name in ("sample_to_mean", "output_to_mean", "std"):
            assert getattr(mixed, name)[index] == getattr(uniform, name)[index]


def test_noise_level_by_step_gives_each_step_its_own_noise():
    levels = [0.0, 0.7, 0.0, 0.3]
    mixed = GaussianSampler.from_scheduler(FlowMatchEulerDiscreteScheduler(), 4, noise_level=levels)
    for index, level in enumerate(levels):
        uniform = GaussianSampler.from_scheduler(FlowMatchEulerDiscreteScheduler(), 4, noise_level=level)
        assert mixed.std[index] == uniform.std[index]
        assert mixed.sample_to_mean[index] == uniform.sample_to_mean[index]


def test_least_noise_is_for_steps_that_are_to_have_noise():
    etas = [1.0] * 5 + [0.0] * 5
    sampler = GaussianSampler.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION), STEPS, etas, min_std=0.5)
    assert sampler.std[:5].min() >= 0.5
    assert not sampler.std[5:].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_step_without_noise_is_not_scored_and_has_no_gradient(reduction):
    sampler = GaussianSampler.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION), STEPS, [1.0, 0.0] * 5)
    whole = GaussianSampler.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION), STEPS)
    latents, output, noise = normals(2, 3, batch=STEPS)
    rows, has_noise = torch.arange(STEPS), sampler.is_stochastic
    actions, _ = sampler.sample(latents, output, rows, noise)
    output.requires_grad_()
    mean = sampler.mean(latents, output, rows)
    log_prob = sampler.log_prob(actions, mean, rows, reduction)
    kl = sampler.kl_divergence(mean, mean.detach() + 1, rows, reduction)
    for values in (log_prob, kl):
        assert values.isfinite().all()
        assert not values[~has_noise].any()
        assert values[has_noise].all()
    scored = whole.log_prob(actions, mean, rows, reduction)
    assert torch.equal(log_prob[has_noise], scored[has_noise]), "steps with noise are scored as ever"
    (log_prob.sum() + kl.sum()).backward()
    assert output.grad.isfinite().all()
    assert not output.grad[~has_noise].any()
    assert output.grad[has_noise].flatten(1).any(dim=1).all()


def test_window_has_the_rows_of_one_table_inside_and_of_another_outside():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noisy, ode = (GaussianSampler.from_scheduler(scheduler, STEPS, sampler=name) for name in ("flow-sde", "ode"))
    window = noisy.windowed(2, 5, ode)
    assert window.is_stochastic.tolist() == [2 <= step < 5 for step in range(STEPS)]
    for name in ("sample_to_mean", "output_to_mean", "std"):
        assert torch.equal(getattr(window, name)[2:5], getattr(noisy, name)[2:5])
        assert torch.equal(getattr(window, name)[5:], getattr(ode, name)[5:])
    with pytest.raises(ValueError, match="outside must be a table of the same timesteps"):
        noisy.windowed(2, 5, GaussianSampler.from_scheduler(scheduler, STEPS + 1, sampler="ode"))
