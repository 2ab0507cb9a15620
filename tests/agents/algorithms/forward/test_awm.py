"""Advantage weighted matching: the paper's loss written again, for three kinds of denoisers; and that it learns."""

import copy

import pytest
import torch
from helpers.algorithms import collected, denoising_awm, logged
from helpers.micro_agents import STEPS, micro_env, stir
from helpers.micro_families import stable_diffusion_2, stable_diffusion_3
from helpers.micro_pipeline import micro_pipeline

from agents.evaluation.evaluate import evaluate
from agents.policy.weight_copies import WeightSnapshot

FAMILIES = {"epsilon": micro_pipeline, "v_prediction": stable_diffusion_2, "flow": stable_diffusion_3}


def weighted_log_prob(output, target, time):
    """`compute_log_prob_awm` of the authors' code with its default weighting, in double precision."""
    log_prob = -((output.double() - target.double()) ** 2).mean(dim=(1, 2, 3))
    eps, power = torch.tensor(1e-10, dtype=torch.float64), 0.25
    return -(torch.pow(-log_prob + eps, power) - torch.pow(eps, power)) * time.flatten() / power


def paper_loss(family, model, batch, policies, noise, kl_coef):
    """The authors' training step, for the outputs of policies by name."""
    x0, timestep = batch.actions, batch.observations["timestep"].flatten()
    if family == "flow":
        time = (timestep / 1000).view(-1, 1, 1, 1)
        noisy, target = (1 - time) * x0 + time * noise, noise - x0
    else:
        scheduler = model.policy.model.scheduler
        noisy = scheduler.add_noise(x0, noise, timestep.long())
        target = noise if family == "epsilon" else scheduler.get_velocity(x0, noise, timestep.long())
        odds = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod)[timestep.long()].sqrt()
        time = odds / (1 + odds)
    conditioning = {one: batch.observations[one] for one in model.policy.model.conditioning_shapes}
    output, sampled, lagging, reference = (
        model.policy.predict_output(noisy, timestep, conditioning, policies[name])
        for name in ("new", "sampled", "lagging", "reference")
    )
    ratio = torch.exp(weighted_log_prob(output, target, time) - weighted_log_prob(sampled, target, time).detach())
    advantages = torch.clamp(batch.advantages, -5, 5) / 5 * 1
    policy_loss = torch.mean(torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 0.0, 2.0)))
    kl_loss = ((output - reference.detach()) ** 2).mean(dim=(1, 2, 3)).mean()
    ema_kl_loss = ((output - lagging.detach()) ** 2).mean(dim=(1, 2, 3)).mean()
    return policy_loss + kl_coef * kl_loss + 1.0 * ema_kl_loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_first_update", [True, False])
def test_loss_and_gradient_are_the_papers(family, is_first_update):
    model = denoising_awm(FAMILIES[family](), num_envs=4, kl_coef=0.5)
    policy = model.policy
    lagging = copy.deepcopy(collected(model).policy)
    stir(policy, 0.05)
    sampled = copy.deepcopy(policy)
    model._sampled = WeightSnapshot(policy.trainable_parameters())
    if not is_first_update:
        stir(policy, 0.02, seed=5)
        model._n_updates = 1
    policies = {"new": policy.denoiser, "sampled": sampled.denoiser, "lagging": lagging.denoiser}
    policies["reference"] = policy.model.denoiser
    batch = model.transitions(model.select_steps())
    torch.manual_seed(3)
    loss, metrics = model.loss(batch)
    torch.manual_seed(3)
    expected = paper_loss(family, model, batch, policies, torch.randn_like(batch.actions), 0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert metrics["loss"].item() == loss.item()
    assert metrics["lag_distance"] > 0
    learning = policy.trainable_parameters()
    mine, theirs = (torch.autograd.grad(one, learning) for one in (loss, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4 * float(other.abs().max()) + 1e-8)
    assert sum(float(one.abs().sum()) for one in theirs) > 1e-3


def test_later_updates_of_an_iteration_compare_with_the_policy_that_sampled(micro_pipeline_folder):
    """With a tiny clip range all ratios but those of the first update are outside."""
    fractions = []
    for updates in (1, 3):
        model = denoising_awm(micro_pipeline_folder, batch_size=6 * STEPS // updates, clip_range=1e-9)
        collected(model).train()
        fractions.append(logged(model)["train/clip_fraction"])
    assert fractions[0] == 0
    assert fractions[1] == pytest.approx(2 / 3, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"power": 2.0}, r"power must be in \(0, 1\]; got 2.0"),
        ({"lag_coef": -1.0}, "lag_coef must be .*; got -1.0"),
        ({"clip_range": 0.0}, "clip_range must be .*; got 0.0"),
    ],
)
def test_bad_argument_is_refused(micro_pipeline_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        denoising_awm(micro_pipeline_folder, **arguments)


def test_brightness_of_sampled_images_rises(micro_pipeline_folder):
    policy = {"lora_rank": 4, "guidance_scale": 1.0}
    model = denoising_awm(micro_pipeline_folder, num_envs=32, learning_rate=2e-2, policy=policy, seed=2)
    held_out = micro_env(micro_pipeline_folder, 32, autoreset_mode="Disabled")
    prompts = [prompt for prompt, _ in held_out.prompts][:32]
    before = evaluate(model.policy, held_out, prompts, seed=10_000).rewards
    model.learn(10 * 32 * STEPS)
    rise = evaluate(model.policy, held_out, prompts, seed=10_000).rewards - before
    assert rise.mean() > 0.3 * before.std(), (rise.mean(), before.std())
