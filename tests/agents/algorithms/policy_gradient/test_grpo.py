"""GRPO: the paper's objective, written again, for a diffusion and a flow; and the parts of a reward that reach it."""

import numpy as np
import pytest
import torch
from helpers.algorithms import brightness_rise, collected, denoising_grpo
from helpers.micro_agents import STEPS, brightness, extent, micro_env, stir
from helpers.micro_families import stable_diffusion_3
from helpers.micro_pipeline import micro_pipeline

from agents import GroupRelativeAdvantage

FAMILIES = {"diffusion": micro_pipeline, "flow": stable_diffusion_3}
KL = 0.3


def paper_loss(model, clip):
    """Equation 3 of Shao et al. for every step of every sample, with the mean log-density of DDPO, sample by sample."""
    rollout, policy = model.rollout_buffer, model.policy
    batch = rollout[np.arange(rollout.rewards.size)]
    now = policy.get_distribution(batch.observations).distribution
    with torch.no_grad():
        pretrained = policy.get_distribution(batch.observations, policy.model.denoiser).distribution
    log_prob = now.log_prob(batch.actions).flatten(1).mean(1)
    divergence = torch.distributions.kl_divergence(now, pretrained).flatten(1).mean(1)
    rewards = rollout.rewards[-1].astype(np.float64)
    losses = []
    for row in range(len(log_prob)):
        sample = row % rollout.n_envs
        group = [rewards[other] for other, prompt in enumerate(rollout.contexts) if prompt == rollout.contexts[sample]]
        advantage = (rewards[sample] - np.mean(group)) / np.std(group)
        ratio = torch.exp(log_prob[row] - batch.log_probs[row])
        objective = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        losses.append(-objective + KL * divergence[row])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_the_papers(family):
    model = collected(denoising_grpo(FAMILIES[family](), num_envs=4, kl_coef=KL))
    stir(model.policy, 0.02)
    batch = model.rollout_buffer[np.arange(4 * STEPS)]
    clip = torch.expm1(model.evaluate(batch).log_ratio).abs().median().item()  # half of the ratios are outside
    model.clip_range = lambda _: clip
    loss, metrics = model.loss(batch)
    assert metrics["clip_fraction"] == pytest.approx(0.5, abs=0.1)
    expected = paper_loss(model, clip)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    learning = model.policy.trainable_parameters()
    for mine, theirs in zip(torch.autograd.grad(loss, learning), torch.autograd.grad(expected, learning), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-5 * float(theirs.abs().max()) + 1e-8)


def test_step_along_the_gradient_makes_good_samples_likelier_than_bad_ones(micro_pipeline_folder):
    model = collected(denoising_grpo(micro_pipeline_folder, num_envs=4, clip_range=1.0))
    batch = model.rollout_buffer[np.arange(4 * STEPS)]
    model.policy.optimizer.zero_grad()
    model.loss(batch)[0].backward()
    with torch.no_grad():
        for parameter in model.policy.trainable_parameters():
            parameter -= 1e-3 * parameter.grad
    log_ratio = model.evaluate(batch).log_ratio
    assert (batch.advantages * log_ratio).mean() > 0


def test_parts_of_a_weighted_sum_reach_the_estimator(micro_pipeline_folder):
    """Numbers by episode, whatever their order in time, without the episodes that were dropped."""

    def partly(images, prompts, metadata):
        scores = brightness(images, prompts, metadata)
        details = {"own": scores, "extent": extent(images, prompts, metadata), "said": list(prompts)}
        return np.where(scores == scores.min(), np.nan, scores), details

    env = micro_env(micro_pipeline_folder, 6, reward=partly, samples_per_prompt=2, non_finite_rewards="keep")
    model = collected(denoising_grpo(env, n_steps=2 * STEPS, non_finite_rewards="drop"))
    rollout = model.rollout_buffer
    assert rollout.details.keys() == {"own", "extent"}, "numbers only"
    assert len(rollout.contexts) == 10
    np.testing.assert_allclose(rollout.details["own"], rollout.segment_returns(), rtol=1e-6)
    assert len(np.unique(rollout.details["own"])) == 10
    rollout.reset()
    assert rollout.details == {}


def test_brightness_of_sampled_images_rises(micro_pipeline_folder):
    policy = {"lora_rank": 4, "guidance_scale": 1.0}
    model = denoising_grpo(
        micro_pipeline_folder, num_envs=32, batch_size=32 * STEPS // 2, learning_rate=2e-2, policy=policy, seed=2
    )
    before, rise = brightness_rise(model, micro_pipeline_folder, 10 * 32 * STEPS)
    assert rise.mean() > 0.3 * before.std(), (rise.mean(), before.std())


def test_advantages_are_the_groups_unless_others_are_given(micro_pipeline_folder):
    assert denoising_grpo(micro_pipeline_folder).advantage == GroupRelativeAdvantage()
    assert denoising_grpo(micro_pipeline_folder, advantage=GroupRelativeAdvantage("none")).advantage.scale == "none"
    alone = denoising_grpo(micro_env(micro_pipeline_folder, 5, prompts=list("abcd")))
    with pytest.raises(ValueError, match="needs at least 2 episodes per prompt"):
        collected(alone)
