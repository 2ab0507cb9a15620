"""Every sampler's marginals on data that is Gaussian, whose denoiser and marginals are known.

The best denoiser of N(m, c²) is affine in the latent, so that each step maps a Gaussian to a Gaussian. Its mean and
variance are computed exactly from the table, without samples.
"""

import math

import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ddpo_env.sampler.gaussian_sampler import GaussianSampler

MEAN, STD = 1.5, 0.7


def propagated(table, outputs, mean, variance):
    """Mean and variance after all steps, where `outputs` are slope and offset of the denoiser at each step."""
    columns = (table.sample_to_mean.tolist(), table.output_to_mean.tolist(), table.std.tolist())
    for (slope, offset), from_sample, from_output, std in zip(outputs, *columns, strict=True):
        gain = from_sample + from_output * slope
        mean, variance = gain * mean + from_output * offset, gain**2 * variance + std**2
    return mean, variance


def flow_error(steps, std=STD, **arguments):
    """Difference of the samples' mean and variance from the data's."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    outputs = []
    for sigma in scheduler.sigmas.double().tolist()[:-1]:
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        slope = (sigma - (1 - sigma) * std**2) / variance  # of E[ε − x0 | x]
        outputs.append((slope, -slope * (1 - sigma) * MEAN - MEAN))
    mean, variance = propagated(GaussianSampler.from_scheduler(scheduler, steps, **arguments), outputs, 0.0, 1.0)
    return mean - MEAN, variance - std**2


DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusion_error(steps, scheduler=None, **arguments):
    """Difference from the marginal at the noise level where the last step ends; the first step begins at its own."""
    ddim = DDIMScheduler(**DIFFUSION, set_alpha_to_one=False, clip_sample=False)
    table = GaussianSampler.from_scheduler(scheduler or ddim, steps, **arguments)
    alphas = ddim.alphas_cumprod.double()[table.timesteps].tolist()
    final = float(ddim.final_alpha_cumprod) if scheduler is None else 1.0
    outputs = []
    for alpha in alphas:
        slope = math.sqrt(1 - alpha) / (alpha * STD**2 + 1 - alpha)  # of E[ε | x]
        outputs.append((slope, -slope * math.sqrt(alpha) * MEAN))
    start = math.sqrt(alphas[0]) * MEAN, alphas[0] * STD**2 + 1 - alphas[0]
    mean, variance = propagated(table, outputs, *start)
    return mean - math.sqrt(final) * MEAN, variance - (final * STD**2 + 1 - final)


CASES = {
    "ode": (flow_error, {"sampler": "ode"}),
    "flow-sde": (flow_error, {"sampler": "flow-sde"}),
    "dance": (flow_error, {"sampler": "dance"}),
    "dance, noisier": (flow_error, {"sampler": "dance", "noise_level": 0.7}),
    "deterministic diffusion": (diffusion_error, {"sampler": "ode"}),
    "ddim": (diffusion_error, {"eta": 1.0}),
    "ddim, less noise": (diffusion_error, {"eta": 0.5}),
    "ddpm": (diffusion_error, {"scheduler": DDPMScheduler(**DIFFUSION, clip_sample=False)}),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_of_many_steps_have_the_distribution_of_the_data(name):
    error, arguments = CASES[name]
    (coarse_mean, coarse), (mean, fine) = error(100, **arguments), error(1000, **arguments)
    assert abs(coarse_mean) < 1e-5
    assert abs(mean) < 1e-5
    assert abs(fine) < 0.007, "of a variance of 0.49"
    assert abs(fine) < abs(coarse) / 5, "the error is of first order"


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [4, 10])
def test_few_steps_keep_the_mean_with_the_linspace_spacing_of_other_schedulers(kind, eta, steps):
    """Each step must end at the noise level that the next call assumes."""
    scheduler = kind(**DIFFUSION)
    assert scheduler.config.timestep_spacing == "linspace"
    assert abs(diffusion_error(steps, scheduler, eta=eta)[0]) < 0.01


def test_ddims_own_linspace_steps_lose_a_part_of_the_signal():
    """What the documentation says of them: they are the pipeline's, so they are kept."""
    scheduler = DDIMScheduler(**DIFFUSION, clip_sample=False, timestep_spacing="linspace")
    assert MEAN + diffusion_error(4, scheduler, sampler="ode")[0] == pytest.approx(1.24, abs=0.005)


@pytest.mark.parametrize(("error", "name"), [(diffusion_error, "eta"), (flow_error, "noise_level")])
def test_steps_with_and_without_noise_can_be_mixed(error, name):
    coarse, fine = (error(steps, **{name: [0.5, 0.0] * (steps // 2)})[1] for steps in (100, 1000))
    assert abs(fine) < 0.006
    assert abs(fine) < abs(coarse) / 5


def test_cps_keeps_the_noise_of_a_point_exactly_but_takes_variance_from_data():
    """What the sampler's documentation says of it. The SDEs lose nothing, whatever the noise."""
    assert flow_error(10, std=0.0, sampler="cps") == pytest.approx((0, 0), abs=1e-6)
    lost = {name: [flow_error(steps, sampler=name)[1] / -(STD**2) for steps in (10, 1000)] for name in ("cps", "ode")}
    assert lost["cps"] == pytest.approx([0.58, 0.355], abs=5e-3), "more steps do not bring it back"
    assert lost["ode"] == pytest.approx([0.40, 0.005], abs=5e-3)
    with_less_noise = flow_error(1000, sampler="cps", noise_level=0.8 * math.sqrt(10 / 1000))[1]
    assert abs(with_less_noise) < 0.006, "noise that falls with the number of steps keeps the distribution"
