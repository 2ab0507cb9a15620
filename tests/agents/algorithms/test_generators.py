"""No reward, callback or other algorithm changes the random numbers that an algorithm trains with."""

import json
import random

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.algorithms import MAKERS, denoising_ppo
from helpers.micro_agents import STEPS, brightness, micro_env, weights
from stable_baselines3.common.callbacks import BaseCallback

from agents.algorithms.generators import Generators
from agents.algorithms.policy_gradient.ppo import PPO
from agents.evaluation.evaluate import evaluate


def seed_everything():
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


def draw_from_everything():
    torch.randn(3), np.random.random(3), random.random()


class Meddling(BaseCallback):
    """Use the global generators at every step."""

    def __init__(self, meddle):
        super().__init__()
        self.meddle = meddle

    def _on_step(self):
        self.meddle()
        return True


def meddling_reward(meddle):
    def reward(images, prompts, metadata):
        meddle()
        return brightness(images, prompts, metadata)

    return reward


MEDDLERS = [lambda: None, seed_everything, draw_from_everything]


@pytest.mark.parametrize("kind", [MAKERS[name] for name in ("ppo", "rwr", "nft", "awm")])
@pytest.mark.parametrize("deferred", [False, True])
def test_reward_and_callback_do_not_change_training(micro_pipeline_folder, kind, deferred):
    results = []
    for meddle in MEDDLERS:
        model = kind(micro_pipeline_folder, timestep_fraction=0.6)
        env = micro_env(
            micro_pipeline_folder, 6, samples_per_prompt=2, reward=meddling_reward(meddle), deferred_rewards=deferred
        )
        env.reset(seed=0)
        model.env.vector_env = env
        model.learn(2 * 6 * STEPS, callback=Meddling(meddle))
        results.append((weights(model.policy), model.rollout_buffer.actions.clone()))
    for other, actions in results[1:]:
        assert torch.equal(actions, results[0][1])
        assert all(torch.equal(value, other[name]) for name, value in results[0][0].items())


class Bandit(gym.Env):
    """One step, a reward that meddles, and an observation that never changes."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, meddle):
        self.meddle = meddle

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.meddle()
        return np.zeros(2, np.float32), float(action.sum()), True, False, {}


def test_policy_of_stable_baselines3_has_its_own_noise_and_dropout():
    results = []
    for meddle in MEDDLERS:
        model = PPO("MlpPolicy", Bandit(meddle), n_steps=16, batch_size=8, n_epochs=2, seed=0, device="cpu")
        model.policy.mlp_extractor.policy_net.append(torch.nn.Dropout(0.5))
        model.learn(48)
        actions = model.rollout_buffer.actions.clone()
        assert len(torch.unique(actions)) == actions.numel(), "no noise is repeated"
        results.append((actions, [parameter.detach().clone() for parameter in model.policy.parameters()]))
    for actions, parameters in results[1:]:
        assert torch.equal(actions, results[0][0])
        assert all(torch.equal(one, other) for one, other in zip(parameters, results[0][1], strict=True))


def test_two_algorithms_in_turn_are_as_each_alone():
    def make(seed):
        return PPO("MlpPolicy", Bandit(lambda: None), n_steps=8, batch_size=8, n_epochs=1, seed=seed, device="cpu")

    alone = make(0).learn(32)
    first, second = make(0), make(1)
    for _ in range(4):
        first.learn(8, reset_num_timesteps=False)
        second.learn(8, reset_num_timesteps=False)
    for one, other in zip(alone.policy.parameters(), first.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_evaluation_does_not_depend_on_a_reward_that_seeds(micro_pipeline_folder):
    model = denoising_ppo(micro_pipeline_folder)
    found = []
    for meddle in MEDDLERS:
        env = micro_env(micro_pipeline_folder, 2, autoreset_mode="Disabled", reward=meddling_reward(meddle))
        found.append(evaluate(model.policy, env, ["a cat"] * 6, seed=3).rewards)
    assert all((rewards == found[0]).all() for rewards in found)


def test_learning_leaves_the_global_generators_alone():
    model = PPO("MlpPolicy", Bandit(lambda: None), n_steps=8, batch_size=8, seed=0, device="cpu")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.learn(16)
    assert torch.equal(torch.get_rng_state(), before)


def test_state_goes_through_json_and_continues():
    one, other = Generators(0, torch.device("cpu")), Generators(None, torch.device("cpu"))

    def drawn(generators):
        with generators.as_global():
            shared = torch.randn(3)
        return torch.cat(
            [shared, torch.randn(3, generator=generators.noise), torch.as_tensor(generators.numpy.random(3))]
        )

    drawn(one)
    other.load_state(json.loads(json.dumps(one.state())))
    assert torch.equal(drawn(one), drawn(other))
    assert not torch.equal(drawn(one), drawn(Generators(1, torch.device("cpu"))))
