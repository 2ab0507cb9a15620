"""The sampler's table against diffusers' own steps and the flow SDE's formula, and every refusal."""

import math

import pytest
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from helpers.sampler_inputs import STABLE_DIFFUSION, normals

from ddpo_env.sampler.gaussian_sampler import GaussianSampler


def assert_relatively_close(actual, expected, tolerance=1e-5):
    assert torch.isfinite(actual).all()
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def library_scheduler(scheduler_class, steps, **config):
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def in_double_precision(scheduler):
    """The library with its schedule in float64: its float32 loses digits of 1 - alpha_t / alpha_prev at many steps."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def assert_equals_ddim(scheduler, sampler, eta):
    latents, output, noise = normals(0, 3)
    for index, timestep in enumerate(scheduler.timesteps):
        row = torch.tensor([index])
        expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise)
        without_noise = scheduler.step(output, timestep, latents, eta=eta, variance_noise=torch.zeros_like(noise))
        next_latents, mean = sampler.sample(latents, output, row, noise)
        assert_relatively_close(next_latents, expected.prev_sample)
        assert_relatively_close(mean, without_noise.prev_sample)
        assert_relatively_close(sampler.predict_x0(latents, output, row), expected.pred_original_sample)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize(
    "clip", [{"clip_sample": False}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.3}]
)
def test_equals_ddim_scheduler(prediction_type, eta, steps, clip):
    scheduler = library_scheduler(DDIMScheduler, steps, **STABLE_DIFFUSION | clip, prediction_type=prediction_type)
    assert_equals_ddim(scheduler, GaussianSampler.from_scheduler(scheduler, steps, eta), eta)


@pytest.mark.parametrize(
    ("spacing", "config"),
    [
        ("trailing", {}),
        ("trailing", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("leading", {"beta_schedule": "linear", "beta_end": 0.02}),
        ("leading", {"beta_schedule": "squaredcos_cap_v2", "steps_offset": 3, "clip_sample": True}),
        ("leading", {"num_train_timesteps": 100}),
    ],
)
@pytest.mark.parametrize("steps", [7, 20])
def test_equals_ddim_scheduler_for_every_spacing_and_schedule(spacing, config, steps):
    config = STABLE_DIFFUSION | {"timestep_spacing": spacing} | config
    scheduler = library_scheduler(DDIMScheduler, steps, **config)
    # At eta = 1 and zero SNR the library takes the square root of a rounding error, which may be negative.
    assert_equals_ddim(scheduler, GaussianSampler.from_scheduler(scheduler, steps, 0.9), 0.9)


def test_zero_snr_at_eta_one_is_finite_where_the_library_is_not():
    config = STABLE_DIFFUSION | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = DDIMScheduler(**config, timestep_spacing="trailing")
    sampler = GaussianSampler.from_scheduler(scheduler, 7)
    latents, output = normals(15, 2)
    assert sampler.timesteps[0] == 999
    # All signal is gone: x0 is -v, and the whole noise is drawn anew.
    assert_relatively_close(sampler.predict_x0(latents, output, torch.tensor([0])), -output)
    assert_relatively_close(
        sampler.mean(latents, output, torch.tensor([0])), -output * (1 - sampler.std[0] ** 2).sqrt()
    )


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_floor_changes_only_the_deterministic_step(set_alpha_to_one):
    config = STABLE_DIFFUSION | {"timestep_spacing": "linspace", "set_alpha_to_one": set_alpha_to_one}
    scheduler = library_scheduler(DDIMScheduler, 10, **config)
    sampler = GaussianSampler.from_scheduler(scheduler, 10, min_std=0.01)
    latents, output, noise = normals(1, 3)
    for index, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(output, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
        next_latents, mean = sampler.sample(latents, output, torch.tensor([index]), noise)
        if index < 9:
            assert_relatively_close(next_latents, expected)
        else:
            assert_relatively_close(mean, expected)
            assert_relatively_close(next_latents - mean, 0.01 * noise, 1e-4)


def test_a_thousand_steps_equal_the_library_in_double_precision():
    scheduler = library_scheduler(
        DDIMScheduler, 1000, **STABLE_DIFFUSION | {"steps_offset": 0}, timestep_spacing="trailing"
    )
    in_double_precision(scheduler)
    sampler = GaussianSampler.from_scheduler(scheduler, 1000, min_std=1e-5)
    latents, output, noise = (tensor.double() for tensor in normals(2, 3))
    for index in [0, 1, 500, 997, 998]:
        timestep = scheduler.timesteps[index]
        expected = scheduler.step(output, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
        actual, _ = sampler.sample(latents, output, torch.tensor([index]), noise)
        assert_relatively_close(actual, expected, 1e-6)


@pytest.mark.parametrize("steps", [61, 103])
def test_surplus_timestep_of_trailing_spacing_is_dropped(steps):
    scheduler = library_scheduler(DDIMScheduler, steps, **STABLE_DIFFUSION, timestep_spacing="trailing")
    assert len(scheduler.timesteps) == steps + 1
    sampler = GaussianSampler.from_scheduler(scheduler, steps)
    assert len(sampler) == steps
    assert sampler.timesteps.tolist() == scheduler.timesteps[:-1].tolist()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_equals_ddpm_scheduler(prediction_type, variance_type, clip_sample, steps):
    scheduler = library_scheduler(
        DDPMScheduler, steps, prediction_type=prediction_type, variance_type=variance_type, clip_sample=clip_sample
    )
    sampler = GaussianSampler.from_scheduler(scheduler, steps, min_std=1e-5)
    latents, output = normals(3, 2)
    (noise,) = normals(4, 1)
    for index, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(output, timestep, latents, generator=torch.Generator().manual_seed(4))
        next_latents, mean = sampler.sample(latents, output, torch.tensor([index]), noise)
        assert_relatively_close(next_latents if timestep > 0 else mean, expected.prev_sample)
        # x0 is a difference of terms that are 150 times larger at the first step, where clipping leaves small values.
        x0 = sampler.predict_x0(latents, output, torch.tensor([index]))
        assert_relatively_close(x0, expected.pred_original_sample, 2e-5)


def test_ddpm_with_large_variance_has_a_density_at_a_last_timestep_above_zero():
    scheduler = library_scheduler(DDPMScheduler, 10, variance_type="fixed_large", timestep_spacing="trailing")
    sampler = GaussianSampler.from_scheduler(scheduler, 10)
    latents, output = normals(5, 2)
    (noise,) = normals(6, 1)
    expected = scheduler.step(output, scheduler.timesteps[9], latents, generator=torch.Generator().manual_seed(6))
    assert_relatively_close(sampler.sample(latents, output, torch.tensor([9]), noise)[0], expected.prev_sample)


@pytest.mark.parametrize(
    "scheduler_class", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDIMParallelScheduler]
)
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_other_schedulers_of_the_family_become_ddim(scheduler_class, spacing):
    """DDIM's own linspace steps have gaps, so only DDIM itself keeps this spacing."""
    settings = {name: STABLE_DIFFUSION[name] for name in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    source = scheduler_class.from_config(
        settings | {"set_alpha_to_one": False, "timestep_spacing": spacing, "clip_sample": False}
    )
    kept = "trailing" if spacing == "linspace" and scheduler_class is not DDIMParallelScheduler else spacing
    expected = GaussianSampler.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing=kept), 20, 0.7)
    actual = GaussianSampler.from_scheduler(source, 20, 0.7)
    for name in ("timesteps", "sample_to_mean", "output_to_mean", "std"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0)


def test_scheduler_that_never_clips_does_not_start_to():
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    assert "clip_sample" not in scheduler.config
    assert GaussianSampler.from_scheduler(scheduler, 10).clip_sample_range is None


def test_stable_diffusion_ends_with_the_published_std():
    sampler = GaussianSampler.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION), 50)
    assert sampler.std[-1].item() == pytest.approx(0.0206, abs=5e-5)
    assert sampler.timesteps[[0, -1]].tolist() == [981, 1]


def test_reading_leaves_the_scheduler_untouched():
    scheduler = library_scheduler(DDIMScheduler, 7, **STABLE_DIFFUSION)
    GaussianSampler.from_scheduler(scheduler, 20)
    assert len(scheduler.timesteps) == 7


def flow_step(latents, velocity, sigma, sigma_next, noise_level):
    """Flow-GRPO's step, written out from the paper's SDE: drift v + s^2/(2 sigma) * (x + (1 - sigma) v)."""
    step = sigma_next - sigma
    level = noise_level * math.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
    drift = velocity + level**2 / (2 * sigma) * (latents + (1 - sigma) * velocity)
    return latents + drift * step, level * math.sqrt(-step)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("noise_level", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 28])
def test_flow_sde_equals_the_formula(shift, noise_level, steps):
    scheduler = library_scheduler(FlowMatchEulerDiscreteScheduler, steps, shift=shift)
    sampler = GaussianSampler.from_scheduler(scheduler, steps, noise_level=noise_level)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    assert scheduler.sigmas[0] == 1
    latents, velocity, noise = normals(7, 3)
    for index in range(steps):
        sigma, sigma_next = scheduler.sigmas[index].item(), scheduler.sigmas[index + 1].item()
        expected_mean, expected_std = flow_step(latents, velocity, sigma, sigma_next, noise_level)
        next_latents, mean = sampler.sample(latents, velocity, torch.tensor([index]), noise)
        assert_relatively_close(mean, expected_mean)
        assert_relatively_close(next_latents, expected_mean + expected_std * noise)
        x0 = sampler.predict_x0(latents, velocity, torch.tensor([index]))
        assert_relatively_close(x0, latents - sigma * velocity)


def test_flow_sde_approaches_the_deterministic_step_as_noise_vanishes():
    scheduler = library_scheduler(FlowMatchEulerDiscreteScheduler, 10, shift=3.0)
    sampler = GaussianSampler.from_scheduler(scheduler, 10, noise_level=2e-3)
    latents, velocity = normals(8, 2)
    for index, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(velocity, timestep, latents).prev_sample
        assert_relatively_close(sampler.mean(latents, velocity, torch.tensor([index])), expected)
    assert sampler.std.max() < 3e-3


def test_flow_times_can_be_given_and_shifted():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = [1.0, 0.75, 0.5, 0.25]
    sampler = GaussianSampler.from_scheduler(scheduler, 4, sigmas=sigmas, mu=0.5)
    scheduler.set_timesteps(sigmas=sigmas, mu=0.5)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    with pytest.raises(ValueError, match="mu must be given"):
        GaussianSampler.from_scheduler(scheduler, 4)
    with pytest.raises(ValueError, match="sigmas must hold num_inference_steps=5 values; got 4"):
        GaussianSampler.from_scheduler(scheduler, 5, sigmas=sigmas, mu=0.5)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**STABLE_DIFFUSION | {"set_alpha_to_one": True}),
        DDIMScheduler(**STABLE_DIFFUSION | {"steps_offset": 0}),
        DDIMScheduler(**STABLE_DIFFUSION, timestep_spacing="linspace"),
        DDPMScheduler(),
        DDPMScheduler(timestep_spacing="trailing"),
        DDPMScheduler(variance_type="fixed_large"),
    ],
    ids=["alpha_one", "no_offset", "linspace", "ddpm", "ddpm_trailing", "ddpm_large"],
)
def test_last_step_without_noise_stays_so_or_gets_the_least_noise_but_is_never_nan(scheduler):
    deterministic = GaussianSampler.from_scheduler(scheduler, 10)
    assert deterministic.is_stochastic.tolist() == [True] * 9 + [False]
    assert deterministic.std[-1] == 0
    sampler = GaussianSampler.from_scheduler(scheduler, 10, min_std=0.02)
    for name in ("sample_to_mean", "output_to_mean", "x0_to_mean"):
        assert torch.equal(getattr(sampler, name), getattr(deterministic, name))
    assert sampler.std.min().item() == pytest.approx(0.02)
    latents, output, noise = normals(14, 3, batch=10)
    rows = torch.arange(10)
    next_latents, mean = sampler.sample(latents, output, rows, noise)
    assert torch.isfinite(sampler.log_prob(next_latents, mean, rows, "sum")).all()
    assert torch.isfinite(sampler.kl_divergence(mean, mean + 1, rows, "sum")).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, r"num_inference_steps must be between 1 and 1000 .*got 0"),
        ({"num_inference_steps": 1001}, r"num_inference_steps must be between 1 and 1000 .*got 1001"),
        ({"num_inference_steps": 1000}, r"num_inference_steps=1000 with steps_offset=1 asks for timestep 1000"),
        ({"eta": -0.5}, "eta must be at least 0 and finite at every step; got -0.5"),
        ({"eta": math.nan}, "eta must be at least 0 and finite at every step; got nan"),
        ({"eta": [1.0] * 9 + [math.inf]}, "eta must be at least 0 and finite at every step; got inf"),
        ({"eta": (1.0, 0.0)}, "eta must be one number, or one for each of the num_inference_steps=10 steps; got 2"),
        ({"eta": 5.0}, r"eta must be at most 1\.\d+ for this schedule and 10 steps.*got 5.0"),
        ({"eta": [0.0] * 9 + [5.0]}, r"eta must be at most [\d.]+ for this schedule and 10 steps.*got 5.0"),
        ({"sampler": "cps"}, "sampler must be one of ddim, ode for a model with DDIMScheduler; got 'cps'"),
        ({"sampler": "ode", "eta": 0.5}, "eta must be left out with sampler ode, which has no noise; got 0.5"),
        ({"sampler": "ode", "min_std": 0.1}, "min_std must be left out with sampler ode"),
        ({"min_std": 0.0}, "min_std must be at least 1e-05; got 0.0"),
        ({"min_std": math.nan}, "min_std must be at least 1e-05; got nan"),
        ({"noise_level": 0.7}, "noise_level applies to FlowMatchEulerDiscreteScheduler only, not to DDIMScheduler"),
        ({"mu": 0.7}, "mu applies to FlowMatch"),
    ],
)
def test_invalid_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianSampler.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION), **{"num_inference_steps": 10} | arguments)


def test_number_of_steps_must_be_an_integer():
    with pytest.raises(TypeError, match="num_inference_steps must be an integer; got 10.5"):
        GaussianSampler.from_scheduler(DDIMScheduler(**STABLE_DIFFUSION), 10.5)


def test_largest_eta_of_the_message_is_valid():
    scheduler = DDIMScheduler(**STABLE_DIFFUSION)
    with pytest.raises(ValueError, match="eta must be at most") as caught:
        GaussianSampler.from_scheduler(scheduler, 10, 5.0)
    largest = float(str(caught.value).split("at most ")[1].split()[0])
    assert largest > 1
    GaussianSampler.from_scheduler(scheduler, 10, largest - 1e-4)
    with pytest.raises(ValueError, match="eta must be at most"):
        GaussianSampler.from_scheduler(scheduler, 10, largest + 1e-3)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (LCMScheduler(), {}, "scheduler must be one of DDIMScheduler, .*; got LCMScheduler"),
        (object(), {}, "scheduler must be one of DDIMScheduler, .*; got object"),
        (DDIMScheduler(thresholding=True), {}, "thresholding must be False"),
        (DDPMScheduler(thresholding=True), {}, "thresholding must be False"),
        (DDPMScheduler(variance_type="learned_range"), {}, "variance_type must be one of fixed_small, .*learned_range"),
        (DDPMScheduler(), {"eta": 0.5}, "eta must be 1 with DDPMScheduler .*got 0.5"),
        (FlowMatchEulerDiscreteScheduler(), {"eta": 0.5}, "eta must be 1 with FlowMatch.*noise_level.*got 0.5"),
        (DDPMScheduler(), {"sampler": "ddim"}, "sampler must be one of ddpm, ode for a model with DDPMSch.*got 'ddim'"),
        (
            FlowMatchEulerDiscreteScheduler(),
            {"sampler": "ddim"},
            "sampler must be one of flow-sde, dance, cps, ode for a model with FlowMatchEuler.*; got 'ddim'",
        ),
        (FlowMatchEulerDiscreteScheduler(), {"noise_level": -0.1}, "noise_level must be at least 0 .*got -0.1"),
        (
            FlowMatchEulerDiscreteScheduler(),
            {"sampler": "cps", "noise_level": 1.2},
            "noise_level must be at most 1 with sampler cps.*got 1.2",
        ),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, "invert_sigmas must be False"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}, "stochastic_sampling must be False"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            {},
            "prediction_type must be one of epsilon, sample, v_prediction; got flow_prediction",
        ),
        (
            DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=False),
            {},
            "prediction_type must be v_prediction or sample .*timestep 999; got epsilon",
        ),
    ],
)
def test_unsupported_schedulers_are_named(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianSampler.from_scheduler(scheduler, 10, **arguments)
