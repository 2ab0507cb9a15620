"""Stock Stable-Baselines3 trains the policy, over its own vectorized environments and over the adapter."""

import zipfile

import gymnasium as gym
import pytest
import safetensors.torch
import torch
from gymnasium.vector import AutoresetMode
from helpers.micro_agents import STEPS, brightness, micro_env, weights
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecMonitor

import agents
import ddpo_env  # noqa: F401  (registers DDPO-SD-v0)
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter

POLICY = {"lora_rank": 2, "lora_targets": "attention+convolutions", "guidance_scale": 2.0}
ROLLOUT = {"n_steps": STEPS, "gamma": 1.0, "gae_lambda": 1.0, "policy_kwargs": POLICY, "seed": 0, "device": "cpu"}


def environment_arguments(folder):
    return {"model": folder, "reward": brightness, "num_inference_steps": STEPS, "device": "cpu"}


def over_dummy_vec_env(folder, backend="numpy"):
    return make_vec_env("DDPO-SD-v0", n_envs=3, seed=0, env_kwargs=environment_arguments(folder))


def over_adapter(folder, backend="numpy"):
    native = gym.make_vec(
        "DDPO-SD-v0", num_envs=3, autoreset_mode="SameStep", backend=backend, **environment_arguments(folder)
    )
    return VectorEnvAdapter(native)


def over_sync_adapter(folder, backend="numpy"):
    synchronous = gym.make_vec(
        "DDPO-SD-v0",
        3,
        "sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        **environment_arguments(folder),
    )
    return VectorEnvAdapter(synchronous)


def assert_trained(model, before):
    after = weights(model.policy)
    assert after.keys() == before.keys()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(not torch.equal(after[name], before[name]) for name in after if "lora_B" in name)


@pytest.mark.parametrize(
    ("vec_env", "backend"),
    [(over_dummy_vec_env, "numpy"), (over_adapter, "numpy"), (over_adapter, "torch"), (over_sync_adapter, "numpy")],
)
def test_stock_ppo_trains(micro_pipeline_folder, vec_env, backend):
    env = vec_env(micro_pipeline_folder, backend)
    model = PPO(DiffusionPolicy, env, batch_size=5, n_epochs=2, **ROLLOUT)
    before = weights(model.policy)
    model.learn(2 * 3 * STEPS)
    assert model.num_timesteps == 2 * 3 * STEPS
    assert_trained(model, before)
    assert len(model.ep_info_buffer) == 6
    assert {episode["l"] for episode in model.ep_info_buffer} == {STEPS}
    assert all(0 < episode["r"] < 1 for episode in model.ep_info_buffer)


@pytest.mark.parametrize("vec_env", [over_dummy_vec_env, over_adapter])
def test_stock_a2c_trains(micro_pipeline_folder, vec_env):
    model = A2C(DiffusionPolicy, vec_env(micro_pipeline_folder), **ROLLOUT)
    before = weights(model.policy)
    model.learn(3 * STEPS)
    assert isinstance(model.policy.optimizer, torch.optim.RMSprop)
    assert_trained(model, before)


def test_stock_ppo_trains_the_critic(micro_pipeline_folder):
    arguments = ROLLOUT | {"policy_kwargs": {**POLICY, "critic": True}}
    model = PPO(DiffusionPolicy, over_adapter(micro_pipeline_folder), batch_size=15, n_epochs=2, **arguments)
    before = weights(model.policy)
    model.learn(3 * STEPS)
    changed = [name for name, value in weights(model.policy).items() if not torch.equal(value, before[name])]
    assert {"critic.value.0.weight", "critic.value.4.bias"} <= set(changed)


@pytest.mark.parametrize("algorithm", [PPO, agents.PPO])
def test_saved_algorithm_keeps_the_trained_weights_in_a_small_file(micro_pipeline_folder, tmp_path, algorithm):
    model = algorithm(DiffusionPolicy, over_adapter(micro_pipeline_folder), batch_size=15, n_epochs=2, **ROLLOUT)
    model.learn(3 * STEPS)
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        if algorithm is PPO:
            state = torch.load(archive.open("policy.pth"), weights_only=True)
        else:
            stored = safetensors.torch.load(archive.read("tensors.safetensors"))
            state = {name.removeprefix("policy."): one for name, one in stored.items() if name.startswith("policy.")}
    assert set(state) == set(weights(model.policy))
    # Adapters, Adam's two averages of them, and what Stable-Baselines3 writes beside them; no frozen weight.
    learned = sum(value.nbytes for value in state.values())
    assert (tmp_path / "model.zip").stat().st_size < 3 * learned + 900 * len(state) + 100_000
    observation = model.get_env().reset()
    expected, _ = model.predict(observation, deterministic=True)
    for env in (None, over_adapter(micro_pipeline_folder)):
        loaded = algorithm.load(tmp_path / "model.zip", env=env, device="cpu")
        for name, value in weights(model.policy).items():
            assert torch.equal(loaded.policy.state_dict()[name], value), name
        assert (loaded.predict(observation, deterministic=True)[0] == expected).all()
    before = weights(loaded.policy)
    loaded.learn(3 * STEPS)
    assert_trained(loaded, before)


def test_wrapped_vec_env_still_tells_the_prompts(micro_pipeline_folder):
    env = VecMonitor(VectorEnvAdapter(micro_env(micro_pipeline_folder, samples_per_prompt=2)))
    model = agents.PPO(DiffusionPolicy, env, batch_size=10, advantage=agents.PerPromptAdvantage(4, 2), **ROLLOUT)
    model.learn(4 * STEPS)
    contexts = model.rollout_buffer.contexts
    assert contexts[0] == contexts[1] != contexts[2] == contexts[3]
    assert set(model.advantage.history) == set(contexts)


@pytest.mark.parametrize("over", [over_dummy_vec_env, over_adapter])
def test_stock_ppo_takes_latents_outside_the_action_box_as_they_are(micro_pipeline_folder, monkeypatch, over):
    monkeypatch.setattr("ddpo_env.spaces.ACTION_BOUND", 0.5)
    model = PPO(DiffusionPolicy, over(micro_pipeline_folder), batch_size=3 * STEPS, **ROLLOUT)
    assert model.action_space.high.max() == 0.5
    model.learn(3 * STEPS)
    buffer = model.rollout_buffer
    observations = torch.as_tensor(buffer.observations["latents"]).reshape(3, STEPS, -1)
    actions = torch.as_tensor(buffer.actions).reshape(3, STEPS, -1)
    assert actions.abs().max() > 0.5
    assert torch.equal(observations[:, 1:], actions[:, :-1])
    latents = {name: torch.as_tensor(value).numpy() for name, value in model.env.reset().items()}
    assert abs(model.predict(latents)[0]).max() > 0.5
