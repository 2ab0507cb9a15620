"""DiffusionNFT: the paper's loss in velocities, written again, for three kinds of denoisers; and that it learns."""

import copy

import pytest
import torch
from helpers.algorithms import brightness_rise, collected, denoising_nft, logged
from helpers.micro_agents import STEPS, stir
from helpers.micro_families import stable_diffusion_2, stable_diffusion_3
from helpers.micro_pipeline import micro_pipeline

FAMILIES = {"epsilon": micro_pipeline, "v_prediction": stable_diffusion_2, "flow": stable_diffusion_3}


def paper_loss(family, model, batch, velocity_of, noise, beta, kl_coef):
    """Equation by equation as the authors' code has it: velocities of the three policies, then predictions of x0."""
    policy, x0, a_max = model.policy, batch.actions, 5.0
    timestep = batch.observations["timestep"].flatten()
    scheduler = policy.model.scheduler
    if family == "flow":
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        alpha = 1 - sigma
    else:
        squared = scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        alpha, sigma = squared**0.5, (1 - squared) ** 0.5
    noisy = alpha * x0 + sigma * noise

    def velocity(output):
        """Of an output; x0 = alpha x - sigma v, and for a flow x0 = x - sigma v."""
        if family != "epsilon":
            return output
        return alpha * output - sigma * (noisy - sigma * output) / alpha

    def x0_of(v):
        return noisy - sigma * v if family == "flow" else alpha * noisy - sigma * v

    outputs = {name: velocity_of(name, noisy, timestep) for name in ("old", "new", "reference")}
    v_old, v_new = velocity(outputs["old"]).detach(), velocity(outputs["new"])
    r = torch.clamp(torch.clamp(batch.advantages, -a_max, a_max) / a_max / 2 + 0.5, 0, 1)
    losses = []
    for v in (beta * v_new + (1 - beta) * v_old, (1 + beta) * v_old - beta * v_new):
        prediction = x0_of(v)
        weight = (prediction - x0).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5).detach()
        losses.append(((prediction - x0) ** 2 / weight).mean((1, 2, 3)))
    policy_loss = ((r * losses[0] / beta + (1 - r) * losses[1] / beta) * a_max).mean()
    return policy_loss + kl_coef * ((outputs["new"] - outputs["reference"].detach()) ** 2).mean((1, 2, 3)).mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("beta", "kl_coef"), [(1.0, 0.0), (0.3, 0.5)])
def test_loss_and_gradient_are_the_papers(family, beta, kl_coef):
    model = denoising_nft(FAMILIES[family](), num_envs=4, beta=beta, kl_coef=kl_coef)
    collected(model)
    old = copy.deepcopy(model.policy)
    stir(model.policy, 0.05)
    batch = model.transitions(model.select_steps())

    def output_of(name, noisy, timestep):
        network = {"old": old.denoiser, "new": model.policy.denoiser, "reference": model.policy.model.denoiser}[name]
        conditioning = {one: batch.observations[one] for one in model.policy.model.conditioning_shapes}
        return model.policy.predict_output(noisy, timestep, conditioning, network)

    torch.manual_seed(3)
    loss, metrics = model.loss(batch)
    torch.manual_seed(3)
    expected = paper_loss(family, model, batch, output_of, torch.randn_like(batch.actions), beta, kl_coef)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert ("kl_penalty" in metrics) == (kl_coef > 0)
    learning = model.policy.trainable_parameters()
    mine, theirs = (torch.autograd.grad(one, learning) for one in (loss, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5 * float(other.abs().max()) + 1e-8)
    assert sum(float(one.abs().sum()) for one in theirs) > 1e-3


def test_good_samples_attract_and_bad_ones_repel(micro_pipeline_folder):
    """At the old policy the gradient is that of the prediction's distance, weighted by the advantage."""
    gradients = {}
    for advantage in (-5.0, 0.0, 5.0):
        model = denoising_nft(
            micro_pipeline_folder, num_envs=4, advantage=lambda _, a=advantage: torch.full((STEPS, 4), a)
        )
        stir(model.policy, 0.05)
        collected(model)
        torch.manual_seed(0)
        loss, _ = model.loss(model.transitions(model.select_steps()))
        gradients[advantage] = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, model.policy.trainable_parameters())]
        )
    torch.testing.assert_close(gradients[5.0], -gradients[-5.0])
    assert gradients[0.0].norm() < 1e-5 * gradients[5.0].norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, r"beta must be in \(0, 100\]; got 0.0"),
        ({"advantage_clip": -1.0}, "advantage_clip must be .*; got -1.0"),
        ({"lag_rate": 2.0}, r"lag_rate must be in \[0, 1\]; got 2.0"),
        ({"lag_limit": 1.0}, r"lag_limit must be in \[0, 1\); got 1.0"),
    ],
)
def test_bad_argument_is_refused(micro_pipeline_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        denoising_nft(micro_pipeline_folder, **arguments)


def test_drift_is_measured_from_the_lagging_policy_that_sampled(micro_pipeline_folder):
    """With log-probabilities that are computed again as with those of the rollout."""
    drift = []
    for recompute in (False, True):
        model = denoising_nft(
            micro_pipeline_folder, learning_rate=0.1, lag_limit=0.9, lag_rate=0.9, recompute_log_probs=recompute
        )
        collected(model).train()
        collected(model).train()  # the lagging policy samples, and is another one by now
        drift.append(logged(model)["train/kl_to_sampling"])
    assert drift[1] == pytest.approx(drift[0], rel=1e-3)


def test_brightness_of_sampled_images_rises(micro_pipeline_folder):
    policy = {"lora_rank": 4, "guidance_scale": 1.0}
    model = denoising_nft(micro_pipeline_folder, num_envs=32, learning_rate=2e-2, policy=policy, seed=2)
    before, rise = brightness_rise(model, micro_pipeline_folder, 10 * 32 * STEPS)
    assert rise.mean() > 0.3 * before.std(), (rise.mean(), before.std())
