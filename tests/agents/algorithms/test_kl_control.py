"""KL control: the divergence from the pretrained policy against torch's, and that the penalty holds the policy back."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.algorithms import MAKERS, collected, denoising_ppo, logged
from helpers.micro_agents import STEPS, micro_env, stir
from peft.tuners.tuners_utils import BaseTunerLayer

from agents import PPO, DiffusionPolicy
from agents.rollout.timesteps import measured_steps


def without_adapters(policy, observation):
    """The means of the same policy with its adapters switched off by peft, and its standard deviations."""
    layers = [module for module in policy.denoiser.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    distribution = policy.get_distribution(observation)
    for layer in layers:
        layer.enable_adapters(True)
    return distribution.mean, distribution.std


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_divergence_is_that_of_the_gaussians_with_and_without_adapters(micro_pipeline_folder, reduction):
    model = denoising_ppo(micro_pipeline_folder, policy={"log_prob_reduction": reduction})
    policy = stir(model.policy, 0.1)
    batch = collected(model).rollout_buffer[np.arange(6 * STEPS)]
    with torch.no_grad():
        values, log_prob, entropy, kl = policy.evaluate_with_reference(batch.observations, batch.actions)
        plain = policy.evaluate_actions(batch.observations, batch.actions)
        mean, std = without_adapters(policy, batch.observations)
        distribution = policy.get_distribution(batch.observations)
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(distribution.mean, std), torch.distributions.Normal(mean, std)
        ).flatten(1)
    torch.testing.assert_close(kl, expected.mean(1) if reduction == "mean" else expected.sum(1), rtol=1e-4, atol=1e-6)
    assert kl.max() > 1e-3
    for mine, theirs in zip((values, log_prob, entropy), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_fresh_policy_is_the_pretrained_one(micro_pipeline_folder, lora_rank):
    model = collected(denoising_ppo(micro_pipeline_folder, policy={"lora_rank": lora_rank}))
    drift = model.drift(np.arange(6 * STEPS))
    assert drift == {"kl_to_sampling": pytest.approx(0, abs=1e-12), "kl_to_pretrained": pytest.approx(0, abs=1e-9)}


def test_full_training_keeps_its_reference(micro_pipeline_folder):
    model = denoising_ppo(micro_pipeline_folder, policy={"lora_rank": 0})
    stir(model.policy, 0.01)
    assert collected(model).drift(np.arange(6 * STEPS))["kl_to_pretrained"] > 1e-6


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_both_divergences_are_always_logged(micro_pipeline_folder, make):
    model = collected(make(micro_pipeline_folder))
    model.train()
    assert logged(model)["train/kl_to_sampling"] > 0
    assert logged(model)["train/kl_to_pretrained"] > 0
    assert "train/kl_penalty" not in logged(model)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_penalty_holds_the_policy_back(micro_pipeline_folder, make):
    divergence = {}
    for kl_coef in (0.0, 1e3):
        model = make(micro_pipeline_folder, kl_coef=kl_coef, learning_rate=5e-3)
        model.learn(4 * 6 * STEPS, log_interval=None)
        divergence[kl_coef] = model.drift(np.arange(6 * STEPS))["kl_to_pretrained"]
    assert logged(model)["train/kl_penalty"] > 0
    assert divergence[1e3] < 0.5 * divergence[0.0]


@pytest.mark.parametrize("name", ["nft", "awm", "dpo", "draft", "rwr"])
def test_kl_target_ends_the_updates_of_an_epoch_where_the_loss_does_not_show_the_kl(micro_pipeline_folder, name):
    counts = {}
    for target in (1e-12, 1e9):
        settings = {"batch_size": 2 if name in ("draft", "rwr") else 10, "n_epochs": 1, "target_kl": target}
        model = collected(MAKERS[name](micro_pipeline_folder, **settings))
        model.train()
        counts[target] = model._n_updates
    assert counts == {1e-12: 1, 1e9: 3}


def test_kl_is_not_measured_for_the_target_after_the_last_update(micro_pipeline_folder, monkeypatch):
    model = collected(MAKERS["nft"](micro_pipeline_folder, batch_size=15, n_epochs=2, target_kl=1e9))
    after, drift = [], model.drift
    monkeypatch.setattr(model, "drift", lambda indices: after.append(model._n_updates) or drift(indices))
    model.train()
    assert after == [1, 2, 3, 4], "between the four updates, and what is logged"


def test_penalty_is_in_the_loss(micro_pipeline_folder):
    model = collected(denoising_ppo(micro_pipeline_folder, kl_coef=3.0))
    stir(model.policy, 0.1)
    batch = model.rollout_buffer[np.arange(6 * STEPS)]
    with_penalty, metrics = model.loss(batch)
    model.options = replace(model.options, kl_coef=0.0)
    without, _ = model.loss(batch)
    kl = model.drift(np.arange(6 * STEPS))["kl_to_pretrained"]
    assert metrics["kl_penalty"].item() == pytest.approx(3 * kl, rel=1e-4)
    assert (with_penalty - without).item() == pytest.approx(3 * kl, rel=1e-3)


def test_policy_without_a_past_has_no_penalty():
    with pytest.raises(ValueError, match="kl_coef must be 0 for a ActorCriticPolicy, which has no pretrained policy"):
        PPO("MlpPolicy", "CartPole-v1", kl_coef=0.1)
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, seed=0, device="cpu")
    model.learn(64, log_interval=None)
    assert logged(model)["train/kl_to_sampling"] > 0
    assert "train/kl_to_pretrained" not in logged(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl_coef": -1.0}, r"kl_coef must be in \[0, 1e\+06\]; got -1.0"),
        ({"kl_coef": math.inf}, r"kl_coef must be in \[0, 1e\+06\]; got inf"),
        ({"target_kl": 0.0}, "target_kl must be in .*; got 0.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\); got 1.0"),
    ],
)
def test_bad_argument_is_refused(micro_pipeline_folder, arguments, message):
    env = micro_env(micro_pipeline_folder)
    with pytest.raises(ValueError, match=message):
        PPO(DiffusionPolicy, env, **arguments)


@pytest.mark.parametrize(
    ("trained", "measured"),
    [(1, [1, 0, 0, 0, 0, 0]), (16, [1, 0, 1, 0, 0, 1]), (40, [1] * 6), (100, [3, 2] * 3), (10_000, [16] * 6)],
)
def test_drift_is_measured_on_a_40th_of_the_trained_steps(micro_pipeline_folder, monkeypatch, trained, measured):
    model = collected(denoising_ppo(micro_pipeline_folder))
    steps, rows = np.resize(np.arange(6 * STEPS), trained), []
    monkeypatch.setattr(model, "select_steps", lambda: steps)
    monkeypatch.setattr(model, "random_steps", np.arange)
    monkeypatch.setattr(model, "drift", lambda indices: rows.append(len(indices)) or {})
    monkeypatch.setattr(model, "_pass", lambda indices, metrics: True)
    monkeypatch.setattr(model, "_record_training", lambda metrics: None)
    for rollout in range(1, 7):
        model.num_timesteps = rollout * model.n_steps * model.n_envs
        model.train()
    assert rows == measured


@pytest.mark.parametrize("trained", [1, 16, 324])
def test_what_is_measured_costs_at_most_2_percent(trained):
    """A call forward for a sampled step, two for a trained one (LoRA's backward costs one more), two for a measured."""
    measured = sum(measured_steps(trained, rollout) for rollout in range(1, 1001))
    assert 0.01 < 2 * measured / (3 * trained * 1000) < 0.02
