"""`save` and `load` mean what they mean in Stable-Baselines3, for diffusion policies and others."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.algorithms import MAKERS, collected, denoising_ppo
from helpers.micro_agents import STEPS, micro_env, weights
from safetensors.torch import load_file, save_file
from stable_baselines3.common.env_util import make_vec_env

from agents import PPO, REINFORCE, DiffusionPolicy, VectorEnvAdapter
from ddpo_env.models import unload_models


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_loaded_algorithm_has_the_weights_and_settings_and_trains_on(micro_pipeline_folder, tmp_path, make):
    model = make(micro_pipeline_folder, max_grad_norm=0.7, ema_decay=0.5, timestep_window=(0.0, 0.8))
    model.learn(2 * 6 * STEPS, log_interval=None)
    model.save(tmp_path / "model.zip")
    env = VectorEnvAdapter(micro_env(micro_pipeline_folder, 6, samples_per_prompt=2))
    loaded = type(model).load(tmp_path / "model.zip", env=env, device="cpu")
    options = loaded.options
    assert isinstance(loaded.policy, DiffusionPolicy)
    assert same(weights(loaded.policy), weights(model.policy))
    assert (loaded.num_timesteps, loaded._n_updates) == (model.num_timesteps, model._n_updates)
    assert (loaded.max_grad_norm, options.ema_decay, options.timestep_window) == (0.7, 0.5, (0.0, 0.8))
    assert type(loaded.advantage) is type(model.advantage)
    before = weights(loaded.policy)
    with loaded.averaged_weights(), model.averaged_weights():
        assert same(weights(loaded.policy), weights(model.policy))
        assert same(weights(loaded.policy), before) == (model._n_updates < 2), "the first update's average is a copy"
    loaded.learn(6 * STEPS, reset_num_timesteps=False, log_interval=None)
    assert loaded.num_timesteps == 3 * 6 * STEPS
    assert not same(weights(loaded.policy), before)


def test_optimizer_goes_on_where_it_was(micro_pipeline_folder, tmp_path):
    model = denoising_ppo(micro_pipeline_folder)
    model.learn(2 * 6 * STEPS, log_interval=None)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    mine, theirs = (one.policy.optimizer.state_dict()["state"] for one in (loaded, model))
    assert len(mine) == len(theirs) > 0
    for index, state in theirs.items():
        assert torch.equal(mine[index]["exp_avg_sq"], state["exp_avg_sq"])


def test_without_an_environment_it_predicts_and_with_one_it_trains(micro_pipeline_folder, tmp_path):
    model = denoising_ppo(micro_pipeline_folder)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    observation, _ = micro_env(micro_pipeline_folder, 3, backend="numpy").reset(seed=0)
    for one in (loaded, model):
        one.policy.set_training_mode(False)
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    loaded.set_env(VectorEnvAdapter(micro_env(micro_pipeline_folder, 6, samples_per_prompt=2)))
    collected(loaded).train()


@pytest.mark.parametrize("change", ["model", "resolution", "steps"])
def test_an_environment_of_another_task_is_refused(micro_pipeline_folder, tmp_path, change):
    model = denoising_ppo(micro_pipeline_folder)
    other = {"model": "tiny"} if change == "model" else {"resolution": 64} if change == "resolution" else {}
    steps = {"num_inference_steps": STEPS + 1} if change == "steps" else {}
    env = VectorEnvAdapter(micro_env(other.pop("model", micro_pipeline_folder), 6, **steps, **other))
    model.save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="space"):
        model.set_env(env)
    with pytest.raises(ValueError, match="space"):
        PPO.load(tmp_path / "model.zip", env=env, device="cpu")


def changed(folder, moved):
    """A copy of a model with other weights of the same shapes."""
    file = shutil.copytree(folder, moved) / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    return moved


def test_an_environment_of_another_training_of_the_same_architecture_is_refused(micro_pipeline_folder, tmp_path):
    model = denoising_ppo(micro_pipeline_folder)
    other = changed(micro_pipeline_folder, tmp_path / "other")
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(VectorEnvAdapter(micro_env(other, 6)))


def test_a_relative_model_folder_is_found_from_another_working_directory(micro_pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(micro_pipeline_folder.parent)
    policy = denoising_ppo(micro_pipeline_folder.name).policy
    policy.save(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["model"] == str(micro_pipeline_folder)
    unload_models()
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    changed(micro_pipeline_folder, tmp_path / "away" / micro_pipeline_folder.name)
    assert same(weights(DiffusionPolicy.load("../policy", "cpu")), weights(policy))


def test_a_model_that_moved_or_changed_must_be_named(micro_pipeline_folder, tmp_path):
    folder = shutil.copytree(micro_pipeline_folder, tmp_path / "model")
    denoising_ppo(folder).policy.save(tmp_path / "policy")
    unload_models()
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"cannot load model '.*model'; .*DiffusionPolicy\.load\('.*', model=\.\.\.\)"):
        DiffusionPolicy.load(tmp_path / "policy", "cpu")
    assert DiffusionPolicy.load(tmp_path / "policy", "cpu", model=tmp_path / "moved")
    changed(micro_pipeline_folder, folder)
    with pytest.raises(ValueError, match=r"has changed since policy .* was saved; .*model=\.\.\."):
        DiffusionPolicy.load(tmp_path / "policy", "cpu")
    assert DiffusionPolicy.load(tmp_path / "policy", "cpu", model=folder)


def test_other_policies_are_saved_and_loaded(tmp_path):
    env = make_vec_env("CartPole-v1", 2, seed=0)
    model = REINFORCE("MlpPolicy", env, seed=0, device="cpu").learn(128, log_interval=None)
    model.save(tmp_path / "model.zip")
    assert same(weights(REINFORCE.load(tmp_path / "model.zip", device="cpu").policy), weights(model.policy))
