"""The pretraining objective, against diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from ddpo_env.sampler.denoising_loss import add_noise, draw_timesteps

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(5, 4, 3, 2, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor([0, 1, 500, 998, 999])


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, PNDMScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_velocity_are_diffusers_own(kind, prediction_type):
    scheduler = kind(prediction_type=prediction_type, **SCHEDULE)
    latents, noise, timestep = batch()
    noised = add_noise(scheduler, latents, noise, timestep)
    noisy, target = noised.latents, noised.target
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timestep))
    alphas = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents  # Salimans & Ho 2022, section 4
    torch.testing.assert_close(target, noise if prediction_type == "epsilon" else velocity)


def test_clean_latents_are_the_target_of_a_model_that_predicts_them():
    latents, noise, timestep = batch()
    noised = add_noise(DDPMScheduler(prediction_type="sample"), latents, noise, timestep)
    assert torch.equal(noised.target, latents)


def test_flow_matching_interpolates():
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise, _ = batch()
    timestep = scheduler.timesteps[[0, 10, 500, 900, 999]]
    noised = add_noise(scheduler, latents, noise, timestep)
    noisy, target = noised.latents, noised.target
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timestep, noise))
    # From the noisy latent, the velocity times the time that is left leads to the clean one.
    sigma = (timestep / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigma * target, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_target_stands_for_the_clean_latents(prediction_type):
    """And an output that is off by a little, for clean latents that are off in proportion: against DDIM's own step."""
    is_flow = prediction_type == "flow"
    scheduler = (
        FlowMatchEulerDiscreteScheduler()
        if is_flow
        else DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **SCHEDULE)
    )
    latents, noise, timestep = batch()
    timestep = timestep[1:4]
    latents, noise = latents[:3], noise[:3]
    noised = add_noise(scheduler, latents, noise, timestep)
    torch.testing.assert_close(noised.predict_clean(noised.target), latents, atol=1e-4, rtol=1e-4)
    output = noised.target + 0.1
    for row, step in enumerate(timestep):
        if is_flow:
            expected = noised.latents[row] - step / 1000 * output[row]
        else:
            scheduler.set_timesteps(1000)
            expected = scheduler.step(output[row], int(step), noised.latents[row]).pred_original_sample
        torch.testing.assert_close(noised.predict_clean(output)[row], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(noised.denoising_loss(output), torch.full((3,), 0.01), atol=1e-5, rtol=1e-4)


def test_fraction_of_noise_is_the_time_of_a_flow():
    latents, noise, timestep = batch()
    flow = add_noise(FlowMatchEulerDiscreteScheduler(), latents, noise, timestep)
    torch.testing.assert_close(flow.noise_fraction, timestep / 1000)
    alpha = DDIMScheduler(**SCHEDULE).alphas_cumprod[timestep]
    noised = add_noise(DDIMScheduler(**SCHEDULE), latents, noise, timestep)
    # As much noise for each unit of signal: sigma / signal = time / (1 - time).
    odds = noised.noise_fraction / (1 - noised.noise_fraction)
    torch.testing.assert_close(odds, ((1 - alpha) / alpha).sqrt(), rtol=1e-4, atol=1e-6)


def test_half_precision_latents_are_noised_in_float32():
    latents, noise, timestep = batch()
    noised = add_noise(DDIMScheduler(**SCHEDULE), latents.bfloat16(), noise, timestep)
    assert noised.latents.dtype == noised.target.dtype == torch.float32


def test_timesteps_cover_the_training_range_evenly():
    torch.manual_seed(0)
    drawn = draw_timesteps(DDIMScheduler(num_train_timesteps=10), 10_000, "cpu")
    assert sorted(set(drawn.tolist())) == list(range(10))
    assert torch.bincount(drawn).min() > 900


@pytest.mark.parametrize("num_train_timesteps", [1, 1000])
def test_times_of_a_flow_are_uniform_whatever_the_scale_of_its_timesteps(num_train_timesteps):
    """Some pipelines count a flow's time from 0 to 1 (Stable Audio 3), where whole timesteps would all be clean."""
    torch.manual_seed(0)
    drawn = draw_timesteps(FlowMatchEulerDiscreteScheduler(num_train_timesteps), 10_000, "cpu") / num_train_timesteps
    assert 0 < drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() <= 1
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    assert (drawn.sort().values - uniform).abs().max() < 0.02, "Kolmogorov-Smirnov: 1.36 / sqrt(n) is 0.0136 at 5 %"
