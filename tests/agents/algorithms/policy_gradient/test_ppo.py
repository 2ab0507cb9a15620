"""PPO: its objective by hand, its rollouts against Stable-Baselines3's, and that it learns."""

import math

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from helpers.algorithms import brightness_rise, collected, denoising_ppo, logged, mean_cartpole_return
from helpers.micro_agents import STEPS, stir, weights
from stable_baselines3.common.env_util import make_vec_env

from agents.algorithms.advantages import PerPromptAdvantage
from agents.algorithms.policy_gradient.ppo import PPO
from agents.rollout.buffer import Transitions
from agents.rollout.vec_env import VectorEnvAdapter


@pytest.fixture(scope="module")
def bundled_or_micro(micro_pipeline_folder):
    return {"tiny": "tiny", "micro": micro_pipeline_folder}


@pytest.mark.parametrize("name", ["micro", "tiny"])
@pytest.mark.parametrize("policy", [{}, {"lora_rank": 0, "guidance_scale": 1.0}])
def test_ratio_before_the_first_update_is_1(bundled_or_micro, name, policy):
    model = denoising_ppo(bundled_or_micro[name], micro_batch_size=7, policy=policy)
    stir(model.policy, 0.02)
    collected(model).train()
    assert 0 <= logged(model)["train/ratio_deviation"] <= 1e-5
    assert logged(model)["train/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert logged(model)["train/clip_fraction"] == 0


def test_deviation_is_measured_on_the_first_update_alone(micro_pipeline_folder):
    model = collected(denoising_ppo(micro_pipeline_folder, batch_size=10, learning_rate=0.05))
    model.train()
    assert model._n_updates == 3
    assert logged(model)["train/ratio_deviation"] <= 1e-5
    assert logged(model)["train/approx_kl"] > 1e-6
    collected(model).rollout_buffer.log_probs -= 0.01
    model.train()
    assert logged(model)["train/ratio_deviation"] == pytest.approx(math.expm1(0.01), rel=1e-2)


@pytest.mark.parametrize("micro_batch_size", [1, 7, 15])
def test_micro_batches_give_the_update_of_one_batch(micro_pipeline_folder, micro_batch_size):
    updates, metrics = [], []
    for size in (None, micro_batch_size):
        policy = {"optimizer_class": torch.optim.SGD, "critic": True}
        model = denoising_ppo(micro_pipeline_folder, micro_batch_size=size, learning_rate=1.0, policy=policy)
        before = weights(stir(model.policy, 0.05))
        collected(model).train()
        assert model._n_updates == 1
        updates.append(torch.cat([(value - before[name]).flatten() for name, value in weights(model.policy).items()]))
        metrics.append({name: value for name, value in logged(model).items() if name.startswith("train/")})
    one, many = updates
    assert one.norm() > 1e-3
    assert (one - many).norm() < 1e-4 * one.norm()
    for name in ("train/loss", "train/grad_norm", "train/value_loss", "train/entropy_loss"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("fraction", "steps"), [(1.0, 5), (0.6, 3), (0.5, 2), (0.01, 1)])
def test_timestep_fraction_trains_exactly_its_steps_of_each_episode(micro_pipeline_folder, fraction, steps):
    model = collected(denoising_ppo(micro_pipeline_folder, n_steps=2 * STEPS, timestep_fraction=fraction))
    segments = model.rollout_buffer.segments.ravel()
    choices = [model.select_steps() for _ in range(2)]
    for chosen in choices:
        assert len(set(chosen)) == len(chosen)
        assert np.bincount(segments[chosen]).tolist() == [steps] * 12
    assert (sorted(choices[0]) == sorted(choices[1])) == (fraction == 1)
    rows = []
    model.policy.denoiser.conv_out.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]) if torch.is_grad_enabled() else 0)
    )
    model.train()
    assert sum(rows) == 2 * 12 * steps, "each chosen step once, doubled by guidance"


def test_timestep_window_leaves_the_other_steps_out(micro_pipeline_folder):
    window = {"timestep_window": (0.2, 0.8), "timestep_fraction": 0.4}
    model = collected(denoising_ppo(micro_pipeline_folder, n_steps=2 * STEPS, **window))
    counts = sum(np.bincount(model.select_steps(), minlength=2 * 6 * STEPS) for _ in range(50))
    by_step = counts.reshape(2, STEPS, 6).sum(axis=(0, 2))
    assert by_step[[0, 4]].sum() == 0
    assert by_step[1:4].min() > 0
    assert by_step.sum() == 50 * 12 * 2


def test_every_step_is_trained_on_sooner_or_later(micro_pipeline_folder):
    model = collected(denoising_ppo(micro_pipeline_folder, timestep_fraction=0.2))
    counts = sum(np.bincount(model.select_steps(), minlength=6 * STEPS) for _ in range(400))
    assert counts.sum() == 400 * 6
    assert counts.min() > 40, "80 are expected of each of the 30 steps"


def test_objective_equals_a_hand_computation():
    model = PPO("MlpPolicy", "CartPole-v1", ent_coef=0.1, vf_coef=0.25, seed=0, device="cpu")
    observations, actions = torch.randn(4, 4), torch.tensor([0, 1, 1, 0])
    values, log_prob, entropy = model.policy.evaluate_actions(observations, actions)
    ratio, advantages = torch.tensor([1.5, 1.5, 0.5, 0.9]), torch.tensor([2.0, -1.0, 3.0, -4.0])
    returns = torch.tensor([1.0, 0.0, -1.0, 2.0])
    old = log_prob.detach() - ratio.log()
    loss, values_logged = model.loss(Transitions(observations, actions, old, values.flatten(), advantages, returns))
    # min(r A, clip(r) A): 1.5·2 against 1.2·2; −1.5 against −1.2; 0.5·3 against 0.8·3; −0.9·4 unclipped
    surrogate = (2.4 - 1.5 + 1.5 - 3.6) / 4
    value_loss = ((values.flatten() - returns) ** 2).mean()
    expected = -surrogate - 0.1 * entropy.mean() + 0.25 * value_loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert values_logged["clip_fraction"].item() == 0.75
    assert values_logged["approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-4)
    assert values_logged["ratio_deviation"].value.item() == pytest.approx(0.5, rel=1e-5)


def test_kl_target_ends_the_iteration():
    counts = {}
    for target in (None, 1e-9, 1e9):
        model = PPO("MlpPolicy", "CartPole-v1", n_steps=128, batch_size=32, n_epochs=3, target_kl=target, seed=0)
        model.learn(128)
        counts[target] = model._n_updates
    assert counts == {None: 12, 1e-9: 1, 1e9: 12}


class Constant(gym.Env):
    """Two steps an episode; every reward is `reward`."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, reward):
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        return np.zeros(2, np.float32), self.reward, self.steps == 2, False, {}


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_reward_that_is_not_finite_leaves_the_weights_alone(micro_pipeline_folder, reward):
    generic = PPO("MlpPolicy", Constant(reward), n_steps=4, batch_size=4, seed=0, device="cpu")
    denoising = denoising_ppo(micro_pipeline_folder)
    denoising.env.vector_env.reward = lambda images, prompts, metadata: [1.0] * 5 + [reward]
    for model in (generic, denoising):
        before = weights(model.policy)
        with pytest.raises(ValueError, match=r"must be finite; got .*(nan|inf)"):
            model.learn(30)
        assert all(torch.equal(value, before[name]) for name, value in weights(model.policy).items())


def test_gradient_that_is_not_finite_is_an_error_and_leaves_the_weights_alone(micro_pipeline_folder):
    model = collected(denoising_ppo(micro_pipeline_folder, batch_size=10))
    model.rollout_buffer.advantages[2, 3] = math.nan
    with pytest.raises(FloatingPointError, match=r"the gradient is not finite after \d updates \(loss nan\)"):
        model.train()
    assert all(torch.isfinite(value).all() for value in weights(model.policy).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_steps": 0}, r"n_steps must be in \[1, 10000000\]; got 0"),
        ({"batch_size": 0}, r"batch_size must be in \[1, 1000000000\]; got 0"),
        ({"micro_batch_size": 0}, r"micro_batch_size must be in \[1, 1000000000\]; got 0"),
        ({"n_epochs": -1}, r"n_epochs must be in \[1, 100000\]; got -1"),
        ({"timestep_fraction": 0.0}, r"timestep_fraction must be in \(0, 1\]; got 0.0"),
        ({"timestep_fraction": 1.1}, r"timestep_fraction must be in \(0, 1\]; got 1.1"),
        ({"timestep_window": (0.5, 0.5)}, r"timestep_window must be two fractions, 0 <= start < end <= 1; got"),
        ({"clip_range": 0.0}, "clip_range must be above 0; got 0.0"),
    ],
)
def test_bad_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PPO("MlpPolicy", "CartPole-v1", **arguments)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_rollout_equals_stable_baselines3(env_id):
    arguments = {"n_steps": 450, "seed": 3, "device": "cpu", "gamma": 0.9, "gae_lambda": 0.8}
    theirs, mine = (
        collected(algorithm("MlpPolicy", env_id, batch_size=90, **arguments)).rollout_buffer
        for algorithm in (stable_baselines3.PPO, PPO)
    )
    for name in ("rewards", "episode_starts", "values", "log_probs", "returns"):
        np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(mine.actions.numpy().ravel(), theirs.actions.ravel())
    np.testing.assert_array_equal(mine[np.arange(450)].observations, theirs.observations.reshape(450, -1))
    assert mine.episode_starts.sum() > 2, "time limits and falls must be among the steps"


def test_box_actions_are_clipped_for_the_environment_and_not_for_the_buffer():
    model = PPO("MlpPolicy", Constant(1.0), n_steps=64, batch_size=64, seed=0, device="cpu")
    model.learn(64, log_interval=None)
    assert model.rollout_buffer.actions.abs().max() > 1
    assert logged(model)["rollout/reward_mean"] == 2.0
    assert logged(model)["train/n_updates"] == 10


def test_pendulum_trains():
    model = PPO("MlpPolicy", make_vec_env("Pendulum-v1", 2), n_steps=200, batch_size=100, n_epochs=2, seed=0)
    before = weights(model.policy)
    model.learn(800, log_interval=None)
    assert model._n_updates == 2 * 2 * 4
    assert not torch.equal(model.policy.log_std, before["log_std"])
    assert np.isfinite(logged(model)["train/explained_variance"])


def test_callback_ends_training_in_the_middle_of_a_rollout():
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, seed=0, device="cpu")
    model.learn(1000, callback=lambda variables, _: variables["self"].num_timesteps < 100)
    assert model.num_timesteps == 100
    assert model._n_updates == 10


def test_native_gymnasium_vector_environment_trains():
    env = gym.make_vec("CartPole-v1", 4, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})
    model = PPO("MlpPolicy", VectorEnvAdapter(env), n_steps=32, batch_size=128, seed=0, device="cpu").learn(256)
    assert model.num_timesteps == 256
    assert np.mean([episode["r"] for episode in model.ep_info_buffer]) > 5


def cartpole_ppo(seed):
    """Hyperparameters of rl-baselines3-zoo for CartPole-v1."""
    return PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", 8, seed=seed),
        n_steps=32,
        batch_size=256,
        n_epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        learning_rate=lambda remaining: 1e-3 * remaining,
        clip_range=lambda remaining: 0.2 * remaining,
        seed=seed,
        device="cpu",
    )


def test_cartpole_improves_in_seconds():
    model = cartpole_ppo(0)
    before = mean_cartpole_return(model, 16)
    after = mean_cartpole_return(model.learn(10_000), 16)
    assert before < 45
    assert after > 90


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cartpole_is_solved(seed):
    mean = mean_cartpole_return(cartpole_ppo(seed).learn(100_000), 100)
    print(f"PPO, CartPole-v1, seed {seed}: {mean:.0f}")
    assert mean >= 475


def test_brightness_of_sampled_images_rises(micro_pipeline_folder):
    model = denoising_ppo(
        micro_pipeline_folder,
        num_envs=16,
        batch_size=40,
        learning_rate=2e-2,
        clip_range=2e-2,
        max_grad_norm=1.0,
        advantage=PerPromptAdvantage(32, 8),
        policy={"lora_rank": 4, "guidance_scale": 1.0},
        seed=1,
    )
    before, rise = brightness_rise(model, micro_pipeline_folder, 12 * 16 * STEPS)
    assert rise.mean() > 0.7 * before.std()
    assert rise.mean() > 5 * rise.std() / math.sqrt(len(rise)), "same seeds, so nearly every image is brighter"
