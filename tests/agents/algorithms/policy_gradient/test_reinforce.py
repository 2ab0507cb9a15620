"""REINFORCE: its gradient by hand and by PPO's, one update a rollout, and that it learns."""

import pytest
import torch
from helpers.algorithms import brightness_rise, collected, denoising_reinforce, logged, mean_cartpole_return
from helpers.micro_agents import STEPS, micro_env, stir, weights
from stable_baselines3.common.env_util import make_vec_env

from agents import PPO, REINFORCE, DiffusionPolicy, PerPromptAdvantage, Transitions, VectorEnvAdapter


def gradient(model):
    """Of the loss over the whole rollout, flat."""
    model.policy.zero_grad()
    loss, _ = model.loss(model.rollout_buffer[model.select_steps()])
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None])


def test_objective_equals_a_hand_computation():
    model = REINFORCE("MlpPolicy", "CartPole-v1", ent_coef=0.1, vf_coef=0.25, seed=0, device="cpu")
    observations, actions = torch.randn(4, 4), torch.tensor([0, 1, 1, 0])
    values, log_prob, entropy = model.policy.evaluate_actions(observations, actions)
    advantages, returns = torch.tensor([2.0, -1.0, 3.0, -4.0]), torch.tensor([1.0, 0.0, -1.0, 2.0])
    loss, metrics = model.loss(
        Transitions(observations, actions, log_prob.detach(), values.flatten(), advantages, returns)
    )
    expected = -(2 * log_prob[0] - log_prob[1] + 3 * log_prob[2] - 4 * log_prob[3]) / 4
    value_loss = ((values.flatten() - returns) ** 2).mean()
    assert loss.item() == pytest.approx((expected - 0.1 * entropy.mean() + 0.25 * value_loss).item(), rel=1e-5)
    assert metrics["approx_kl"] == metrics["ratio_deviation"].value == 0


def test_gradient_is_ppos_before_its_first_update(micro_pipeline_folder):
    """At ratio 1 the clipped objective's gradient is the score function's."""
    mine = denoising_reinforce(micro_pipeline_folder)
    stir(mine.policy, 0.05)
    collected(mine)
    env = VectorEnvAdapter(micro_env(micro_pipeline_folder, 6, samples_per_prompt=2))
    policy_arguments = {"lora_rank": 2, "lora_targets": "attention+convolutions", "guidance_scale": 3.0}
    theirs = PPO(DiffusionPolicy, env, n_steps=STEPS, clip_range=1e-4, policy_kwargs=policy_arguments, device="cpu")
    theirs.policy.load_state_dict(mine.policy.state_dict())
    theirs._setup_learn(1)
    theirs.rollout_buffer = mine.rollout_buffer
    assert gradient(mine).norm() > 1e-3
    torch.testing.assert_close(gradient(mine), gradient(theirs), rtol=1e-4, atol=1e-7)


def test_rollout_is_good_for_one_update(micro_pipeline_folder):
    model = denoising_reinforce(micro_pipeline_folder, micro_batch_size=7)
    rows = []
    model.policy.denoiser.conv_out.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    collected(model).train()
    assert model._n_updates == 1
    assert rows == [14, 14, 14, 14, 4], "30 transitions in calls of 7, doubled by guidance"
    assert logged(model)["train/ratio_deviation"] <= 1e-5


@pytest.mark.parametrize("name", ["batch_size", "n_epochs", "clip_range"])
def test_what_would_make_it_off_policy_is_not_there(name):
    with pytest.raises((TypeError, ValueError), match=name):
        REINFORCE("MlpPolicy", "CartPole-v1", **{name: 2})


def cartpole_reinforce(seed):
    env = make_vec_env("CartPole-v1", 8, seed=seed)
    arguments = {"n_steps": 64, "gamma": 0.98, "gae_lambda": 0.95, "learning_rate": 3e-3}
    return REINFORCE("MlpPolicy", env, seed=seed, device="cpu", **arguments)


def test_cartpole_improves_in_seconds():
    assert mean_cartpole_return(cartpole_reinforce(0).learn(20_000), 16) > 90, "a random policy gets 22"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cartpole_is_learned(seed):
    mean = mean_cartpole_return(cartpole_reinforce(seed).learn(60_000), 100)
    print(f"REINFORCE, CartPole-v1, seed {seed}: {mean:.0f}")
    assert mean > 100


def test_brightness_of_sampled_images_rises(micro_pipeline_folder):
    model = denoising_reinforce(
        micro_pipeline_folder,
        num_envs=32,
        learning_rate=6e-2,
        advantage=PerPromptAdvantage(32, 8),
        policy={"lora_rank": 4, "guidance_scale": 1.0},
        seed=1,
    )
    untrained = weights(model.policy)
    before, rise = brightness_rise(model, micro_pipeline_folder, 6 * 32 * STEPS)
    assert not all(torch.equal(value, untrained[name]) for name, value in weights(model.policy).items())
    assert rise.mean() > 0.3 * before.std()
