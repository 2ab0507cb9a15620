"""Trust regions of PPO: the losses of the authors' codes, written again, for a diffusion and a flow."""

import numpy as np
import pytest
import torch
from helpers.algorithms import collected, denoising_grpo
from helpers.micro_agents import STEPS, stir
from helpers.micro_families import stable_diffusion_3
from helpers.micro_pipeline import micro_pipeline

from agents import PPO
from agents.algorithms.policy_gradient.trust_region import guarded_surrogate, masked_surrogate
from agents.policy.abilities import StepMove
from agents.policy.weight_copies import WeightSnapshot

FAMILIES = {"diffusion": micro_pipeline, "flow": stable_diffusion_3}


def moved(family, **arguments):
    """A model after one update, with the means of the policy that sampled, the batch, and the outputs of both."""
    model = collected(denoising_grpo(FAMILIES[family](), num_envs=4, **arguments))
    batch = model.rollout_buffer[np.arange(4 * STEPS)]
    with torch.no_grad():
        old_mean = model.policy.get_distribution(batch.observations).mean
    model._sampled = WeightSnapshot(model._learning_parameters(), model._n_updates)
    stir(model.policy, 0.05)
    model._n_updates += 1
    return model, batch, old_mean


def step_sizes(family, model):
    """The standard deviation of every step and its Δ, from the scheduler, in double precision."""
    scheduler, timesteps = model.policy.model.scheduler, model.policy.sampler.timesteps
    if family == "flow":
        sigma = torch.cat([timesteps.double() / 1000, torch.zeros(1)])
        dt = sigma[:-1] - sigma[1:]
        std_dev_t = 0.7 * (sigma[:-1] / (1 - torch.where(sigma[:-1] == 1, sigma[1:], sigma[:-1]))).sqrt()
        return std_dev_t * dt.sqrt(), dt
    ratio = scheduler.config.num_train_timesteps // STEPS
    alphas, final = scheduler.alphas_cumprod.double(), scheduler.final_alpha_cumprod.double()
    now = alphas[timesteps]
    following = torch.stack([alphas[t - ratio] if t >= ratio else final for t in timesteps])
    times = [(1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt()) for a in (now, following)]
    std = ((1 - following) / (1 - now) * (1 - now / following)).clamp(min=0).sqrt()
    return std, times[0] - times[1]


@pytest.mark.parametrize("kind", ["guard", "dppo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_the_authors(family, kind):
    model, batch, old_mean = moved(family, trust_region=kind)
    std, dt = (column[np.arange(4 * STEPS) // 4] for column in step_sizes(family, model))
    now = model.policy.get_distribution(batch.observations)
    torch.testing.assert_close(now.std.flatten(1)[:, 0].double(), std, rtol=1e-4, atol=1e-6)
    log_ratio = now.log_prob(batch.actions) - batch.log_probs
    bias = (now.mean - old_mean).pow(2).flatten(1).mean(1) / (2 * std**2)
    if kind == "guard":
        ratio = torch.exp((log_ratio + bias) * std)
        clip = (ratio - 1).abs().median().item()
        model.clip_range = lambda _: clip
        unclipped = -batch.advantages * ratio
        clipped = -batch.advantages * ratio.clamp(1 - clip, 1 + clip)
        expected = (torch.maximum(unclipped, clipped) / dt).mean()
    else:
        ratio = torch.exp(log_ratio)
        model.divergence_limit = limit = bias.median().item()
        rises = (batch.advantages > 0) & (ratio > 1)
        falls = (batch.advantages < 0) & (ratio < 1)
        removed = (bias > limit) & (rises | falls)
        assert 0 < removed.sum() < (rises | falls).sum(), "some that lead away are near enough"
        expected = torch.where(removed, 0.0, -batch.advantages * ratio).mean()
    loss, metrics = model.loss(batch)
    assert metrics["policy_gradient_loss"].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
    assert metrics["sampling_divergence"].item() == pytest.approx(bias.mean().item(), rel=1e-3)
    learning = model.policy.trainable_parameters()
    for mine, theirs in zip(torch.autograd.grad(loss, learning), torch.autograd.grad(expected, learning), strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-2, atol=1e-3 * float(theirs.abs().max()) + 1e-8)


@pytest.mark.parametrize("step", [0, 2])
def test_first_update_of_guard_weighs_a_timestep_by_its_noise_over_its_length(step):
    """There the ratio is 1 and nothing is clipped: the gradient of a step is that of PPO, times std over Δ."""
    gradients = {}
    for kind in ("clip", "guard"):
        model = collected(denoising_grpo(stable_diffusion_3(), num_envs=4, trust_region=kind))
        model._sampled = WeightSnapshot(model._learning_parameters(), model._n_updates)
        loss, _ = model.loss(model.rollout_buffer[np.arange(4 * step, 4 * step + 4)])
        grads = torch.autograd.grad(loss, model.policy.trainable_parameters())
        gradients[kind] = torch.cat([one.flatten() for one in grads])
        std, dt = step_sizes("flow", model)
    weight = float(std[step] / dt[step])
    scale = float(gradients["guard"].abs().max())
    torch.testing.assert_close(gradients["guard"], weight * gradients["clip"], rtol=1e-3, atol=1e-3 * scale)
    assert weight > 1.5


def test_guards_ratio_has_no_bias_and_the_same_spread_at_every_noise():
    """The same move of a mean, at two noise levels: the log-ratio is biased by −D, guard's exponent is not."""
    generator = torch.Generator().manual_seed(0)
    shift = 0.3 * torch.ones(4)
    for std in (0.2, 0.8):
        noise = torch.randn(200_000, 4, generator=generator)
        log_ratio = ((std * noise) ** 2 - (std * noise - shift) ** 2).mean(1) / (2 * std**2)
        move = StepMove((shift**2).mean() / (2 * std**2), torch.tensor(std), torch.tensor(1.0))
        exponent = guarded_surrogate(log_ratio, move, torch.ones(()), clip_range=1e9)[0].log()
        assert log_ratio.mean().item() == pytest.approx(-move.divergence.item(), abs=0.01)
        assert exponent.mean().item() == pytest.approx(0, abs=2e-3)
        assert exponent.std().item() == pytest.approx(0.3 / 2, rel=0.01)


def test_masks_only_steps_that_are_far_and_lead_away():
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0, 0.0])
    far = torch.tensor([0.1, 0.1, 0.1, 0.1, 1e-3, 0.1])
    one = torch.ones(6)
    objective, metrics = masked_surrogate(log_ratio, StepMove(far, one, one), advantages, limit=0.01)
    expected = advantages * log_ratio.detach().exp() * torch.tensor([0.0, 1, 1, 0, 1, 1])
    torch.testing.assert_close(objective, expected)
    torch.testing.assert_close(torch.autograd.grad(objective.sum(), log_ratio)[0], expected)
    assert metrics["dropped_fraction"].item() == pytest.approx(2 / 6)


def test_policy_without_a_sampler_is_refused_by_name():
    for kind in ("guard", "dppo"):
        with pytest.raises(ValueError, match=f"trust_region must be clip for a ActorCriticPolicy.*got '{kind}'"):
            PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, trust_region=kind, device="cpu")
