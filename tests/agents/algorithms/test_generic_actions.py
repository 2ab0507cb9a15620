"""Policies of Stable-Baselines3 learn with action boxes of any shape, and on the denoising environment itself."""

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from helpers.algorithms import collected, logged
from helpers.micro_agents import STEPS, micro_env
from stable_baselines3.common.vec_env import VecEnv

from agents.algorithms.policy_gradient.ppo import PPO
from agents.rollout.vec_env import VectorEnvAdapter


class Target(gym.Env):
    """One step; the reward is how near the action is to 0.5."""

    observation_space = gym.spaces.Box(-1, 1, (3,))

    def __init__(self, shape):
        self.action_space = gym.spaces.Box(-1, 1, shape)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), -float(((action - 0.5) ** 2).mean()), True, False, {}


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 2), (1, 3, 1)])
def test_one_update_is_that_of_stable_baselines3(shape):
    models = []
    for kind in (stable_baselines3.PPO, PPO):
        torch.manual_seed(0)
        model = kind("MlpPolicy", Target(shape), n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
        models.append(model.learn(64))
    for theirs, ours in zip(*(model.policy.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "space", [gym.spaces.MultiBinary(4), gym.spaces.MultiDiscrete([3, 2]), gym.spaces.Discrete(3, start=0)]
)
def test_discrete_actions_start_at_ratio_1(space):
    env = Target((1,))
    env.action_space = space
    env.step = lambda action: (np.zeros(3, np.float32), float(np.sum(action)), True, False, {})
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu").learn(32)
    assert model.logger.name_to_value["train/ratio_deviation"] < 1e-5


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_multi_input_policy_trains_on_the_denoising_environment(micro_pipeline_folder, backend):
    env = VectorEnvAdapter(micro_env(micro_pipeline_folder, 4, backend=backend))
    model = PPO("MultiInputPolicy", env, n_steps=STEPS, batch_size=4 * STEPS, n_epochs=1, seed=0, device="cpu")
    model.learn(4 * STEPS)
    assert model.logger.name_to_value["train/ratio_deviation"] < 1e-3


class Bare(VecEnv):
    """A vectorized environment that does not call its base class's constructor, as in Stable-Baselines3's tests."""

    def __init__(self):
        self.num_envs, self.render_mode = 2, None
        self.observation_space, self.action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def reset(self):
        return np.zeros((2, 2), np.float32)

    def step_async(self, actions):
        pass

    def step_wait(self):
        return np.zeros((2, 2), np.float32), np.zeros(2, np.float32), np.zeros(2, bool), [{}, {}]

    def close(self):
        pass

    def get_attr(self, name, indices=None):
        return [getattr(self, name)] * 2

    def set_attr(self, *args, **kwargs):
        pass

    def env_method(self, *args, **kwargs):
        pass

    def env_is_wrapped(self, wrapper, indices=None):
        return [False] * 2


def test_vec_env_without_reset_infos_trains():
    assert PPO("MlpPolicy", Bare(), n_steps=8, batch_size=16, device="cpu").learn(16).num_timesteps == 16


@pytest.mark.parametrize(
    "arguments", [{}, {"clip_range_vf": 0.05}, {"normalize_advantage": False}, {"target_kl": 1e-4}]
)
def test_several_updates_are_those_of_stable_baselines3(arguments):
    """Whole rollouts as minibatches, so that their order does not matter."""
    models = []
    for kind in (stable_baselines3.PPO, PPO):
        settings = {"n_steps": 64, "batch_size": 64, "n_epochs": 4, "seed": 0, "device": "cpu"}
        models.append(kind("MlpPolicy", "Pendulum-v1", **settings | arguments).learn(128))
    for theirs, ours in zip(*(model.policy.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_weights_whose_step_epsilon_limits_are_counted_as_adam_sees_them():
    policy = {"optimizer_kwargs": {"betas": (0.9, 0.999), "eps": 1e-4}}
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=2, policy_kwargs=policy, seed=0, device="cpu")
    parameters, squares = list(model.policy.parameters()), []
    model.policy.optimizer.register_step_pre_hook(
        lambda *_: squares.append(torch.cat([one.grad.flatten() for one in parameters]).double() ** 2)
    )
    collected(model).train()
    first, second = squares
    unbiased = (0.001 * 0.999 * first + 0.001 * second) / (1 - 0.999**2)
    expected = float((unbiased.sqrt() < 1e-4).double().mean())
    assert 0.1 < expected < 0.9
    assert logged(model)["train/adam_epsilon_fraction"] == pytest.approx(expected, abs=1e-3)


def test_advantages_are_standardised_in_each_minibatch():
    model = PPO(
        "MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, micro_batch_size=5, n_epochs=1, seed=0, device="cpu"
    )
    seen = []
    update = model._update

    def watched(indices, metrics):
        result = update(indices, metrics)
        chosen = model.rollout_buffer.advantages.flatten()[torch.as_tensor(indices)]
        seen.append((model._batch_moments, (chosen.mean(), chosen.std())))
        return result

    model._update = watched
    model.learn(64)
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert all(used == measured for used, measured in seen)


class InOrder(np.random.Generator):
    """A generator that shuffles nothing."""

    def permutation(self, x, axis=0):
        return x


def test_update_of_one_transition_is_that_of_stable_baselines3(monkeypatch):
    """It has no spread, so its advantage is left as it is, whatever the minibatch before it had."""
    monkeypatch.setattr(np.random, "permutation", np.arange)
    models = []
    for kind in (stable_baselines3.PPO, PPO):
        settings = {"n_steps": 3, "batch_size": 2, "n_epochs": 1, "seed": 0, "device": "cpu"}
        with pytest.warns(UserWarning, match="mini-batch|does not divide"):
            model = kind("MlpPolicy", "Pendulum-v1", **settings)
        if kind is PPO:
            model.generators.numpy = InOrder(np.random.PCG64(0))
        models.append(model.learn(3))
    for theirs, ours in zip(*(model.policy.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
