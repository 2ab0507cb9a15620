"""A callback or an error stops `learn` within an episode; the next `learn` trains on whole, aligned episodes."""

import numpy as np
import pytest
from helpers.algorithms import denoising_ppo
from helpers.micro_agents import STEPS
from stable_baselines3.common.callbacks import BaseCallback

from agents.algorithms.policy_gradient.ppo import PPO


class StopAt(BaseCallback):
    """Stop, or raise, at the n-th step."""

    def __init__(self, n, error=None):
        super().__init__()
        self.n, self.error = n, error

    def _on_step(self):
        if self.n_calls == self.n and self.error is not None:
            raise self.error
        return self.n_calls != self.n


def first_ratio_deviation(model, monkeypatch):
    noted = []
    record = model._record_training
    monkeypatch.setattr(
        model, "_record_training", lambda metrics: (noted.append(metrics["ratio_deviation"][0]), record(metrics))
    )
    model.learn(6 * STEPS, reset_num_timesteps=False)
    return noted[-1]


@pytest.mark.parametrize("stop_at", [1, 3, STEPS])
@pytest.mark.parametrize("error", [None, RuntimeError("a callback failed")])
def test_next_rollout_has_whole_episodes_in_order(micro_pipeline_folder, monkeypatch, stop_at, error):
    model = denoising_ppo(micro_pipeline_folder)
    if error is None:
        model.learn(6 * STEPS, callback=StopAt(stop_at))
    else:
        with pytest.raises(RuntimeError, match="a callback failed"):
            model.learn(6 * STEPS, callback=StopAt(stop_at, error))
    assert model.num_timesteps == 6 * stop_at
    assert first_ratio_deviation(model, monkeypatch) < 1e-4
    timesteps = model.rollout_buffer[np.arange(6 * STEPS)].observations["timestep"].view(STEPS, 6)
    assert (timesteps[1:] < timesteps[:-1]).all()
    assert model.rollout_buffer.complete_segments().all()


def test_generic_environment_begins_a_new_episode_too():
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, seed=0, device="cpu")
    model.learn(16, callback=StopAt(5))
    model.learn(16, reset_num_timesteps=False)
    assert model.num_timesteps == 5 + 16
    first = model.rollout_buffer[np.arange(1)].observations
    assert model.rollout_buffer.episode_starts[0].all()
    assert first.abs().max() <= 0.05, "CartPole starts within 0.05"


class Recorded(BaseCallback):
    """Keep the learning rate of each update."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self.model._n_updates:
            self.rates.append(self.model.policy.optimizer.param_groups[0]["lr"])

    _on_training_end = _on_rollout_start


def test_schedule_follows_the_progress_of_each_call():
    model = PPO(
        "MlpPolicy", "CartPole-v1", lambda remaining: remaining, n_steps=8, batch_size=8, n_epochs=1, device="cpu"
    )
    for _ in range(2):
        seen = Recorded()
        model.learn(32, callback=seen, reset_num_timesteps=False)
        assert seen.rates[-4:] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    for _ in range(2):  # calls of one iteration
        seen = Recorded()
        model.learn(8, callback=seen, reset_num_timesteps=False)
        assert seen.rates[-1] == 1


def test_callbacks_see_the_names_and_the_buffer_of_stable_baselines3():
    seen = {}

    class Looking(BaseCallback):
        def _on_step(self):
            seen.update(self.locals)
            assert self.model.rollout_buffer.size() == self.locals["n_steps"]
            return True

    model = PPO("MlpPolicy", "Pendulum-v1", n_steps=4, batch_size=4, device="cpu").learn(4, callback=Looking())
    assert {
        "new_obs",
        "obs_tensor",
        "clipped_actions",
        "actions",
        "rewards",
        "dones",
        "infos",
        "n_rollout_steps",
    } <= set(seen)
    assert model.rollout_buffer.size() == 4
    assert np.abs(seen["clipped_actions"]).max() <= 2
