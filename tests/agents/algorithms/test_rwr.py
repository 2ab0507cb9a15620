"""Reward-weighted regression: weights and losses by hand, what is imitated, and that it learns."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers.algorithms import brightness_rise, collected, denoising_rwr, logged, mean_cartpole_return
from helpers.micro_agents import STEPS, micro_env, stir, weights
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from agents import RWR, BatchAdvantage, PerPromptAdvantage


def final_weights(model):
    """Weights of the finished samples; all other steps must have none."""
    credit = model.rollout_buffer.advantages
    assert not credit[:-1].any()
    return credit[-1].numpy()


def test_weights_are_exponential_in_the_reward_and_1_on_average(micro_pipeline_folder):
    model = collected(denoising_rwr(micro_pipeline_folder, beta=40.0))
    rewards = model.rollout_buffer.segment_returns()
    expected = np.exp(40.0 * rewards)
    assert expected.max() > 1.2 * expected.min()
    np.testing.assert_allclose(final_weights(model), expected / expected.mean(), rtol=1e-4)


def test_large_beta_does_not_overflow(micro_pipeline_folder):
    model = collected(denoising_rwr(micro_pipeline_folder, beta=1e6))
    assert final_weights(model).tolist() == [6.0 if best else 0.0 for best in final_weights(model) > 0]
    assert len(model.select_steps()) == 1, "what has no weight is not trained on"


def test_percentile_keeps_the_best(micro_pipeline_folder):
    model = collected(denoising_rwr(micro_pipeline_folder, num_envs=10, weighting="percentile", percentile=70))
    rewards = model.rollout_buffer.segment_returns()
    chosen = final_weights(model) > 0
    assert chosen.sum() == 3
    assert rewards[chosen].min() > rewards[~chosen].max()
    assert final_weights(model)[chosen] == pytest.approx(10 / 3)
    assert (model.select_steps() // 10).tolist() == [STEPS - 1] * 3


def test_advantages_that_are_equal_all_count(micro_pipeline_folder):
    model = denoising_rwr(micro_pipeline_folder, weighting="percentile")
    model.env.vector_env.reward = lambda images, prompts, metadata: [1.0] * len(images)
    assert final_weights(collected(model)).tolist() == [1.0] * 6


def test_diffusion_policy_imitates_by_its_pretraining_loss(micro_pipeline_folder):
    """Against the loop that diffusers' training examples have."""
    model = collected(denoising_rwr(micro_pipeline_folder))
    stir(model.policy, 0.05)
    batch = model.rollout_buffer[model.select_steps()]
    torch.manual_seed(3)
    losses = model.policy.regression_loss(batch)
    torch.manual_seed(3)
    scheduler = DDPMScheduler.from_config(model.policy.model.scheduler.config)
    clean = model.rollout_buffer.actions[-1]
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (6,))
    noise = torch.randn_like(clean)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    positive = batch.observations["prompt_embeds"]
    negative = model.policy.model.encode_prompts([""])["prompt_embeds"].expand_as(positive)
    outputs = [model.policy.denoiser(noisy, timesteps, embeds).sample for embeds in (negative, positive)]
    prediction = outputs[0] + 3.0 * (outputs[1] - outputs[0])  # the authors' `train_cfg`
    expected = torch.nn.functional.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_other_policies_imitate_by_likelihood():
    model = collected(RWR("MlpPolicy", "CartPole-v1", n_steps=32, seed=0, device="cpu"))
    batch = model.rollout_buffer[np.arange(32)]
    _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    loss, metrics = model.loss(batch)
    assert batch.advantages.mean() == pytest.approx(1, rel=1e-5)
    assert metrics["regression_loss"].item() == pytest.approx(-(batch.advantages * log_prob).mean().item(), rel=1e-5)
    values = model.policy.predict_values(batch.observations).flatten()
    value_loss = ((values - batch.returns) ** 2).mean()
    assert loss.item() == pytest.approx((metrics["regression_loss"] + 0.5 * value_loss).item(), rel=1e-5)


def test_weights_of_each_prompt_are_a_softmax_of_its_own(micro_pipeline_folder):
    """Against `softmax(labels[mask], temperature) * mask.sum()` of the authors' code."""
    model = denoising_rwr(micro_pipeline_folder, num_envs=8, beta=40.0, weighting="exponential_per_prompt")
    collected(model)
    rewards, prompts = model.rollout_buffer.segment_returns(), np.array(model.rollout_buffer.contexts)
    expected = np.empty(8)
    for prompt in np.unique(prompts):
        mask = prompts == prompt
        expected[mask] = np.exp(40.0 * rewards[mask]) / np.exp(40.0 * rewards[mask]).sum() * mask.sum()
    np.testing.assert_allclose(final_weights(model), expected, rtol=1e-4)
    pooled = np.exp(40.0 * rewards) / np.exp(40.0 * rewards).mean()
    assert len(np.unique(prompts)) > 1
    assert np.abs(pooled - expected).max() > 0.05


def test_weights_per_prompt_need_prompts():
    model = RWR("MlpPolicy", "CartPole-v1", n_steps=32, seed=0, device="cpu", weighting="exponential_per_prompt")
    with pytest.raises(ValueError, match="weighting must be exponential or percentile .*got 'exponential_per_prompt'"):
        collected(model)


def test_weights_per_prompt_need_two_samples_of_each(micro_pipeline_folder):
    """A single sample would have weight 1, whatever its reward."""
    with pytest.raises(ValueError, match="samples_per_prompt must be at least 2 with weighting='exponential_"):
        denoising_rwr(micro_env(micro_pipeline_folder, 1), weighting="exponential_per_prompt")


def test_epochs_train_on_finished_latents_alone(micro_pipeline_folder):
    model = denoising_rwr(micro_pipeline_folder, n_epochs=3, micro_batch_size=4)
    rows = []
    model.policy.denoiser.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    collected(model).train()
    assert rows == [8, 4] * 3  # guidance doubles them
    assert model._n_updates == 3
    assert logged(model)["train/kl_to_sampling"] > 0


def test_kl_target_ends_the_epochs(micro_pipeline_folder):
    counts = {}
    for target in (1e-12, 1e9):
        model = denoising_rwr(micro_pipeline_folder, n_epochs=4, target_kl=target)
        collected(model).train()
        counts[target] = model._n_updates
    assert counts == {1e-12: 1, 1e9: 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weighting": "softmax"}, "weighting must be one of exponential, .*, percentile; got 'softmax'"),
        ({"beta": 0.0}, r"beta must be in \(0, 1e\+06\]; got 0.0"),
        ({"percentile": 100.0}, r"percentile must be in \[0, 100\); got 100.0"),
        ({"n_epochs": 0}, r"n_epochs must be in \[1, 100000\]; got 0"),
    ],
)
def test_bad_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RWR("MlpPolicy", "CartPole-v1", **arguments)


def test_saved_and_loaded_it_goes_on(tmp_path):
    model = RWR("MlpPolicy", "CartPole-v1", n_steps=64, weighting="percentile", percentile=50, seed=0, device="cpu")
    model.learn(64)
    model.save(tmp_path / "rwr.zip")
    loaded = RWR.load(tmp_path / "rwr.zip", env=make_vec_env("CartPole-v1", 1, seed=5), device="cpu")
    assert (loaded.weighting, loaded.percentile) == ("percentile", 50)
    before = weights(loaded.policy)
    assert all(torch.equal(value, before[name]) for name, value in weights(model.policy).items())
    loaded.learn(64)
    assert any(not torch.equal(value, before[name]) for name, value in weights(loaded.policy).items())


CARTPOLE = {
    "exponential": {"batch_size": 128, "n_epochs": 5},
    "percentile": {"batch_size": 128, "n_epochs": 10, "percentile": 70},
}


def cartpole_rwr(weighting, seed):
    env = make_vec_env("CartPole-v1", 8, seed=seed)
    arguments = {"n_steps": 64, "gamma": 0.98, "learning_rate": 1e-3, **CARTPOLE[weighting]}
    return RWR("MlpPolicy", env, weighting=weighting, seed=seed, device="cpu", **arguments)


@pytest.mark.parametrize("weighting", CARTPOLE)
def test_cartpole_improves_in_seconds(weighting):
    mean = mean_cartpole_return(cartpole_rwr(weighting, 0).learn(12_000), 16)
    assert mean > 60, "a random policy gets 22"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weighting", CARTPOLE)
def test_cartpole_is_learned(weighting, seed):
    mean = mean_cartpole_return(cartpole_rwr(weighting, seed).learn(20_000), 100)
    print(f"RWR, {weighting}, CartPole-v1, seed {seed}: {mean:.0f}")
    assert mean > 66, "three times a random policy's 22"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pendulum_is_learned(seed):
    env = make_vec_env("Pendulum-v1", 8, seed=seed)
    arguments = {"learning_rate": 1e-3, "n_steps": 256, "batch_size": 256, "n_epochs": 10, "gamma": 0.9}
    model = RWR("MlpPolicy", env, seed=seed, device="cpu", **arguments).learn(80_000)
    mean, _ = evaluate_policy(model, make_vec_env("Pendulum-v1", 8, seed=100), 40)
    print(f"RWR, exponential, Pendulum-v1, seed {seed}: {mean:.0f}")
    assert mean > -900, "a random policy gets -1250"


@pytest.mark.parametrize("weighting", ["exponential", "percentile"])
def test_brightness_of_sampled_images_rises(micro_pipeline_folder, weighting):
    model = denoising_rwr(
        micro_pipeline_folder,
        num_envs=32,
        weighting=weighting,
        n_epochs=10,
        learning_rate=2e-2,
        advantage=BatchAdvantage() if weighting == "percentile" else PerPromptAdvantage(32, 8),
        policy={"lora_rank": 4, "guidance_scale": 1.0},
        seed=2,
    )
    before, rise = brightness_rise(model, micro_pipeline_folder, 6 * 32 * STEPS)
    assert rise.mean() > 0.3 * before.std(), (rise.mean(), before.std())
