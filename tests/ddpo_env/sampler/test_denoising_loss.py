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
    noisy, target = add_noise(scheduler, latents, noise, timestep)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timestep))
    alphas = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents  # Salimans & Ho 2022, section 4
    torch.testing.assert_close(target, noise if prediction_type == "epsilon" else velocity)


def test_clean_latents_are_the_target_of_a_model_that_predicts_them():
    latents, noise, timestep = batch()
    _, target = add_noise(DDPMScheduler(prediction_type="sample"), latents, noise, timestep)
    assert torch.equal(target, latents)


def test_flow_matching_interpolates():
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise, _ = batch()
    timestep = scheduler.timesteps[[0, 10, 500, 900, 999]]
    noisy, target = add_noise(scheduler, latents, noise, timestep)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timestep, noise))
    # From the noisy latent, the velocity times the time that is left leads to the clean one.
    sigma = (timestep / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigma * target, latents, atol=1e-5, rtol=1e-5)


def test_half_precision_latents_are_noised_in_float32():
    latents, noise, timestep = batch()
    noisy, target = add_noise(DDIMScheduler(**SCHEDULE), latents.bfloat16(), noise, timestep)
    assert noisy.dtype == target.dtype == torch.float32


def test_timesteps_cover_the_training_range_evenly():
    torch.manual_seed(0)
    drawn = draw_timesteps(DDIMScheduler(num_train_timesteps=10), 10_000, "cpu")
    assert sorted(set(drawn.tolist())) == list(range(10))
    assert torch.bincount(drawn).min() > 900
