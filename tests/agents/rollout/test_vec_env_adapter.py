"""The native batch as a Stable-Baselines3 `VecEnv`: step by step what Stable-Baselines3's own classes do."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers.micro_agents import STEPS, micro_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import ddpo_env  # noqa: F401  (registers DDPO-SD-v0)
from agents import PPO
from agents.rollout.vec_env import VectorEnvAdapter

SAME_STEP = {"autoreset_mode": AutoresetMode.SAME_STEP}


class Counter(gym.Env):
    """Counts to `limit`; terminates there, or is truncated at 3. Observations are a dictionary."""

    def __init__(self, limit=2):
        self.limit = limit
        self.count = 0
        self.observation_space = spaces.Dict(
            {"count": spaces.Discrete(10), "pair": spaces.Box(-1, 10, (2,), np.float32)}
        )
        self.action_space = spaces.Discrete(2)

    def observe(self):
        return {"count": self.count, "pair": np.full(2, self.count, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {"start": "begun", "final_answer": "no"}

    def step(self, action):
        self.count += 1
        info = {"final_answer": f"counted {self.count}", "nested": {"count": self.count}}
        return self.observe(), 0.5, self.count == self.limit, self.count == 3, info


def assert_same_step(adapted, expected):
    observation, rewards, dones, infos = adapted
    expected_observation, expected_rewards, expected_dones, expected_infos = expected
    np.testing.assert_array_equal(observation, expected_observation)
    np.testing.assert_array_equal(rewards, expected_rewards)
    np.testing.assert_array_equal(dones, expected_dones)
    assert rewards.dtype == expected_rewards.dtype
    assert dones.dtype == np.bool_
    for index in np.flatnonzero(dones):
        mine, theirs = infos[index], expected_infos[index]
        np.testing.assert_array_equal(mine["terminal_observation"], theirs["terminal_observation"])
        assert mine["TimeLimit.truncated"] == theirs["TimeLimit.truncated"]
        assert (mine["episode"]["r"], mine["episode"]["l"]) == (theirs["episode"]["r"], theirs["episode"]["l"])
    for index in np.flatnonzero(~dones):
        assert not {"terminal_observation", "episode"} & infos[index].keys()


def test_cartpole_equals_dummy_vec_env_with_monitor_step_by_step():
    makers = [lambda: gym.make("CartPole-v1", max_episode_steps=25)] * 3
    adapter = VectorEnvAdapter(SyncVectorEnv(makers, **SAME_STEP))
    expected = VecMonitor(DummyVecEnv(makers))
    for vec_env in (adapter, expected):
        vec_env.seed(7)
    for _ in range(2):
        np.testing.assert_array_equal(adapter.reset(), expected.reset())
    rng = np.random.default_rng(0)
    truncated = terminated = 0
    for _ in range(300):
        actions = rng.integers(2, size=3)
        adapted = adapter.step(actions)
        assert_same_step(adapted, expected.step(actions))
        _, _, dones, infos = adapted
        cut = sum(infos[index]["TimeLimit.truncated"] for index in np.flatnonzero(dones))
        truncated, terminated = truncated + cut, terminated + dones.sum() - cut
    assert truncated > 3
    assert terminated > 3


def test_make_vec_cartpole_is_taken_as_it_is():
    adapter = VectorEnvAdapter(gym.make_vec("CartPole-v1", 2, "sync", vector_kwargs=SAME_STEP))
    assert adapter.num_envs == 2
    assert adapter.reset().shape == (2, 4)
    adapter.close()


def test_dictionaries_and_infos_arrive_for_each_sub_environment():
    makers = [lambda: Counter(2), lambda: Counter(5)]
    adapter = VectorEnvAdapter(SyncVectorEnv(makers, **SAME_STEP))
    adapter.reset()
    assert adapter.reset_infos == [{"start": "begun", "final_answer": "no"}] * 2
    _, _, dones, infos = adapter.step(np.zeros(2, int))
    assert not dones.any()
    assert [info["nested"] for info in infos] == [{"count": 1}, {"count": 1}]
    adapter.reset_infos = [{}, {}]
    observation, _, dones, infos = adapter.step(np.zeros(2, int))
    assert dones.tolist() == [True, False]
    assert observation["count"].tolist() == [0, 2]
    assert infos[0]["terminal_observation"]["count"] == 2
    np.testing.assert_array_equal(infos[0]["terminal_observation"]["pair"], [2, 2])
    assert infos[0]["final_answer"] == infos[1]["final_answer"] == "counted 2"
    assert not infos[0]["TimeLimit.truncated"]
    assert "start" not in infos[0]
    assert adapter.reset_infos == [{"start": "begun", "final_answer": "no"}, {}]
    _, _, dones, infos = adapter.step(np.zeros(2, int))
    assert dones.tolist() == [False, True]
    assert infos[1]["TimeLimit.truncated"]
    assert infos[1]["episode"] == {"r": 1.5, "l": 3, "t": infos[1]["episode"]["t"]}
    assert infos[1]["episode"]["t"] >= 0


def test_episode_that_ends_at_its_time_limit_is_not_truncated():
    adapter = VectorEnvAdapter(SyncVectorEnv([lambda: Counter(3)], **SAME_STEP))
    adapter.reset()
    for _ in range(3):
        _, _, dones, infos = adapter.step(np.zeros(1, int))
    assert dones.all()
    assert not infos[0]["TimeLimit.truncated"]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_native_batch_ends_with_image_prompt_and_last_latents(micro_pipeline_folder, backend):
    adapter = VectorEnvAdapter(micro_env(micro_pipeline_folder, backend=backend, samples_per_prompt=2))
    adapter.seed(0)
    first = adapter.reset()
    assert isinstance(first["latents"], np.ndarray if backend == "numpy" else torch.Tensor)
    prompts = [info["prompt"] for info in adapter.reset_infos]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        actions = rng.standard_normal(first["latents"].shape, np.float32)
        observation, rewards, dones, infos = adapter.step(actions)
        assert dones.all() == dones.any() == (step == STEPS - 1)
        assert rewards.any() == dones.any()
    for index, info in enumerate(infos):
        np.testing.assert_array_equal(info["terminal_observation"]["latents"], actions[index])
        assert info["terminal_observation"]["timestep"] == 0
        assert info["prompt"] == prompts[index]
        assert info["image"].mean() / 255 == pytest.approx(rewards[index], abs=1e-6)
        assert info["episode"]["r"] == pytest.approx(rewards[index])
        assert info["episode"]["l"] == STEPS
        assert not info["TimeLimit.truncated"]
    assert not np.array_equal(observation["latents"], actions)
    embeds = adapter.vector_env.model.encode_prompts([info["prompt"] for info in adapter.reset_infos])
    np.testing.assert_array_equal(observation["prompt_embeds"], embeds["prompt_embeds"])


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(micro_pipeline_folder, mode):
    for env in (
        micro_env(micro_pipeline_folder, autoreset_mode=mode),
        gym.make_vec("CartPole-v1", 2, "sync", vector_kwargs={"autoreset_mode": mode}),
    ):
        with pytest.raises(ValueError, match=r"autoreset_mode must be .*SAME_STEP"):
            VectorEnvAdapter(env)


@pytest.mark.parametrize("env", ["CartPole-v1", None, Counter(), DummyVecEnv([Counter])])
def test_what_is_no_batch_of_gymnasium_is_refused(env):
    with pytest.raises(TypeError, match=rf"^env must be a gymnasium.vector.VectorEnv, .*got a {type(env).__name__}"):
        VectorEnvAdapter(env)


def test_algorithm_names_the_adapter_if_it_is_missing():
    batch = gym.make_vec("CartPole-v1", 2, "sync", vector_kwargs=SAME_STEP)
    with pytest.raises(TypeError, match=r"^env must be .* VecEnv; got a SyncVectorEnv.*VectorEnvAdapter\(.*SameStep"):
        PPO("MlpPolicy", batch, n_steps=8)
    model = PPO("MlpPolicy", VectorEnvAdapter(batch), n_steps=8, batch_size=16)
    with pytest.raises(TypeError, match="VectorEnvAdapter"):
        model.set_env(batch)


def test_seeds_and_options_hold_for_one_reset(micro_pipeline_folder):
    adapter = VectorEnvAdapter(micro_env(micro_pipeline_folder))
    adapter.seed(5)
    first = adapter.reset()["latents"]
    assert not torch.equal(adapter.reset()["latents"], first)
    adapter.seed(5)
    assert torch.equal(adapter.reset()["latents"], first)
    native = micro_env(micro_pipeline_folder)
    assert torch.equal(native.reset(seed=5)[0]["latents"], first)
    adapter.set_options({"prompts": "a cat", "latents": first[0]})
    assert torch.equal(adapter.reset()["latents"], first[:1].expand_as(first))
    assert [info["prompt"] for info in adapter.reset_infos] == ["a cat"] * 4
    assert not torch.equal(adapter.reset()["latents"], first[:1].expand_as(first))
    with pytest.raises(ValueError, match="options must be one dictionary for the whole batch; got a list"):
        adapter.set_options([{"prompts": "a cat"}] * 4)


def test_attributes_and_methods_are_the_batchs(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder, render_mode="rgb_array")
    adapter = VectorEnvAdapter(env)
    assert adapter.render_mode == "rgb_array"
    assert adapter.get_attr("num_inference_steps") == [STEPS] * 4
    assert adapter.get_attr("num_inference_steps", indices=[0, 2]) == [STEPS] * 2
    assert adapter.has_attr("reward")
    assert not adapter.has_attr("colour")
    adapter.set_attr("reward", len)
    assert env.reward is len
    with pytest.raises(ValueError, match="indices must be None"):
        adapter.set_attr("reward", len, indices=[1])
    adapter.reset()
    states = adapter.env_method("state_dict")
    assert len(states) == 4
    assert torch.equal(states[0][0]["latents"], env.observe()["latents"])
    with pytest.raises(ValueError, match="indices must be None"):
        adapter.env_method("state_dict", indices=0)
    assert adapter.env_is_wrapped(gym.Wrapper) == [False] * 4
    images = adapter.get_images()
    assert len(images) == 4
    assert images[0].shape == (32, 32, 3)


def test_stock_evaluation_finds_the_episodes_and_does_not_ask_for_a_monitor():
    adapter = VectorEnvAdapter(gym.make_vec("CartPole-v1", 2, "sync", vector_kwargs=SAME_STEP))
    expected = VecMonitor(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2))
    model = PPO("MlpPolicy", adapter, n_steps=8, batch_size=16, seed=0, device="cpu")
    results = []
    for vec_env in (adapter, expected):
        vec_env.seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results.append(evaluate_policy(model, vec_env, n_eval_episodes=4, return_episode_rewards=True))
    assert results[0] == results[1]
    assert adapter.env_is_wrapped(Monitor, indices=[1]) == [True]


def test_nothing_is_rendered_without_a_render_mode(micro_pipeline_folder):
    adapter = VectorEnvAdapter(micro_env(micro_pipeline_folder))
    adapter.reset()
    assert adapter.get_images() == [None] * 4
