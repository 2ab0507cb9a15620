"""Online DPO: the loss of Diffusion-DPO, written again, for three kinds of denoisers; which samples are pairs."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.algorithms import POLICY, collected, denoising_dpo, logged
from helpers.micro_agents import STEPS, micro_env, stir, weights
from helpers.micro_families import stable_diffusion_2, stable_diffusion_3
from helpers.micro_pipeline import micro_pipeline
from helpers.points_models import points_config
from torch.nn import functional

from agents import DPO, DiffusionPolicy, RawReturn, VectorEnvAdapter
from agents.training.preparation import run_training

FAMILIES = {"epsilon": micro_pipeline, "v_prediction": stable_diffusion_2, "flow": stable_diffusion_3}
BETA = 50.0


def papers_loss(family, model, indices, noise):
    """As the authors' code has it, pair by pair: `noise` has one row for each."""
    rollout, policy = model.rollout_buffer, model.policy
    losses = []
    for row, index in enumerate(indices):
        step, winner = divmod(int(index), rollout.n_envs)
        rewards = {
            other: float(rollout.rewards[-1, other])
            for other, prompt in enumerate(rollout.contexts)
            if prompt == rollout.contexts[winner]
        }
        assert winner == max(rewards, key=rewards.get)
        loser = min(rewards, key=rewards.get)
        timestep = policy.sampler.timesteps[step].float()
        errors = {}
        for sample in (winner, loser):
            x0, eps = rollout.actions[-1, sample][None], noise[row][None]
            if family == "flow":
                alpha, sigma = 1 - timestep / 1000, timestep / 1000
            else:
                squared = policy.model.scheduler.alphas_cumprod[int(timestep)]
                alpha, sigma = squared**0.5, (1 - squared) ** 0.5
            target = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[family]
            conditioning = {
                name: rollout[np.array([sample])].observations[name] for name in policy.model.conditioning_shapes
            }
            for name, network in {"model": policy.denoiser, "ref": policy.model.denoiser}.items():
                output = policy.predict_output(alpha * x0 + sigma * eps, timestep[None], conditioning, network)
                errors[sample, name] = functional.mse_loss(output, target)
        model_diff = errors[winner, "model"] - errors[loser, "model"]
        ref_diff = (errors[winner, "ref"] - errors[loser, "ref"]).detach()
        losses.append(-functional.logsigmoid(-0.5 * BETA * (model_diff - ref_diff)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_the_papers(family):
    model = collected(denoising_dpo(FAMILIES[family](), num_envs=4, beta=BETA, timestep_fraction=0.4))
    stir(model.policy, 0.05)
    indices = model.select_steps()
    assert len(indices) == 2 * 2, "two prompts at two timesteps"
    torch.manual_seed(3)
    loss, metrics = model.loss(model.transitions(indices))
    torch.manual_seed(3)
    expected = papers_loss(family, model, indices, torch.randn(4, *model.policy.model.latent_shape))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(loss.item() - math.log(2)) > 1e-3
    learning = model.policy.trainable_parameters()
    for mine, theirs in zip(torch.autograd.grad(loss, learning), torch.autograd.grad(expected, learning), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-8)
    assert 0 <= metrics["preference_accuracy"] <= 1


def test_step_along_the_gradient_prefers_the_winners(micro_pipeline_folder):
    """At the pretrained policy the loss is log 2; a small step makes every other number follow."""
    model = collected(denoising_dpo(micro_pipeline_folder, num_envs=4, beta=2000.0))
    batch = model.transitions(model.select_steps())
    torch.manual_seed(0)
    loss, _ = model.loss(batch)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    model.policy.optimizer.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.policy.trainable_parameters():
            parameter -= 1e-4 * parameter.grad
    torch.manual_seed(0)
    after, metrics = model.loss(batch)
    assert after < loss
    assert metrics["winner_change"] < metrics["loser_change"]


def test_pairs_are_the_best_and_the_worst_of_each_prompt(micro_pipeline_folder):
    """Ten samples of three prompts in two episodes each; one prompt has equal samples, and one sample was dropped."""
    env = micro_env(micro_pipeline_folder, 5, samples_per_prompt=5)
    model = collected(denoising_dpo(env, n_steps=2 * STEPS, advantage=RawReturn()))
    rollout = model.rollout_buffer
    rollout.contexts = ["a", "a", "a", "b", "b", "c", "a", "c", "b", "c"]
    rollout.rewards[STEPS - 1] = [3, 9, 1, 7, 5]
    rollout.rewards[2 * STEPS - 1] = [2, -1, 2, np.nan, 2]
    rollout.drop_non_finite()
    rollout.advantages = model.step_weights(rollout)
    first, second = (STEPS - 1) * 5, (2 * STEPS - 1) * 5
    assert model._loser_of == {first + 1: second + 1, first + 3: first + 4}
    indices = model.select_steps()
    assert sorted(indices) == sorted([step * 5 + winner for step in range(STEPS) for winner in (1, 3)])
    batch = model.transitions(indices)
    noised = model.noised(batch)
    winners, losers = batch.actions.chunk(2)
    for row, index in enumerate(indices):
        assert torch.equal(winners[row], rollout.actions[STEPS - 1, index % 5])
        loser = (2 * STEPS - 1, 1) if index % 5 == 1 else (STEPS - 1, 4)
        assert torch.equal(losers[row], rollout.actions[loser])
    assert torch.equal(*noised.timestep.chunk(2))
    noise = (noised.latents - noised.signal * noised.clean) / noised.sigma
    torch.testing.assert_close(*noise.chunk(2), rtol=0, atol=1e-4)
    assert not torch.allclose(noise[0], noise[1])


@pytest.mark.parametrize("arguments", [{}, {"batch_size": 8, "recompute_log_probs": True, "ema_decay": 0.5}])
def test_iteration_without_a_pair_has_no_update(micro_pipeline_folder, arguments):
    model = denoising_dpo(
        micro_env(micro_pipeline_folder, 4, samples_per_prompt=2, reward=lambda *_: [1.0] * 4), **arguments
    )
    before = weights(model.policy)
    collected(model).train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model.policy).items())
    assert (logged(model)["train/pairs"], logged(model)["train/n_updates"]) == (0, 0)


def test_updates_have_about_the_same_size_and_calls_whole_pairs(micro_pipeline_folder):
    """Seven pairs with four rows an update, two pairs: four updates; a call of five rows has two pairs."""
    model = denoising_dpo(micro_pipeline_folder, batch_size=4, micro_batch_size=5)
    assert [len(batch) for batch in model._batches(np.arange(7))] == [2, 2, 2, 1]
    assert [len(call) for call in model._micro_batches(np.arange(7))] == [2, 2, 2, 1]
    model.micro_batch_size = 1
    assert [len(call) for call in model._micro_batches(np.arange(3))] == [1, 1, 1]
    model.batch_size = 10
    assert [len(batch) for batch in model._batches(np.arange(6))] == [3, 3]


def test_prompt_with_one_sample_and_a_policy_without_a_pretrained_one_are_refused(micro_pipeline_folder):
    with pytest.raises(ValueError, match="DPO needs at least 2 episodes per prompt"):
        collected(denoising_dpo(micro_env(micro_pipeline_folder, 5, prompts=list("abcd"))))

    class Alone(DiffusionPolicy):
        knows_reference = False

    env = VectorEnvAdapter(micro_env(micro_pipeline_folder, 2))
    with pytest.raises(ValueError, match="policy must know a pretrained one with DPO.*got a Alone"):
        DPO(Alone, env, n_steps=STEPS, policy_kwargs=copy.copy(POLICY), device="cpu")


def test_points_go_where_the_reward_rises(tmp_path):
    settings = {"algorithm": "dpo", "dpo_beta": 50.0, "samples_per_prompt": 8, "eval_interval": 0}
    result = run_training(points_config(tmp_path / "run", **settings))
    assert result.reward_after > result.reward_before + 1
