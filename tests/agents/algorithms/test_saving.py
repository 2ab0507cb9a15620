"""An algorithm comes back from its file, and nothing in a file is executed."""

import io
import json
import os
import pickle
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from helpers.algorithms import denoising_ppo, denoising_rwr
from helpers.micro_agents import STEPS, micro_env, weights

from agents.algorithms.advantages import BatchAdvantage, PerPromptAdvantage
from agents.algorithms.policy_gradient.ppo import PPO
from agents.algorithms.policy_gradient.reinforce import REINFORCE
from agents.rollout.vec_env import VectorEnvAdapter

ALGORITHM, TENSORS = "algorithm.json", "tensors.safetensors"


def small_ppo(**arguments):
    settings = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "seed": 0, "device": "cpu"}
    return PPO("MlpPolicy", "CartPole-v1", **settings | arguments)


def test_generic_algorithm_comes_back_and_goes_on(tmp_path):
    policy = {"activation_fn": torch.nn.ReLU, "net_arch": {"pi": [8], "vf": [8]}, "optimizer_class": torch.optim.AdamW}
    model = small_ppo(policy_kwargs=policy, clip_range=0.1, target_kl=0.5).learn(32)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    assert (loaded.n_steps, loaded.batch_size, loaded.num_timesteps, loaded.options) == (16, 8, 32, model.options)
    assert loaded.policy_kwargs == policy
    assert loaded.clip_range(1.0) == 0.1
    assert loaded.generator_state() == model.generator_state()
    start = np.zeros(4, np.float32)
    assert (loaded.predict(start, deterministic=True)[0] == model.predict(start, deterministic=True)[0]).all()
    for one, other in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    moments = [one.policy.optimizer.state_dict()["state"] for one in (model, loaded)]
    assert all(
        torch.equal(value, moments[1][index][name]) for index in moments[0] for name, value in moments[0][index].items()
    )
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 48


def test_without_environment_it_predicts():
    model = small_ppo()
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = PPO.load(file, device="cpu")
    assert loaded.observation_space == model.observation_space
    assert loaded.action_space.contains(loaded.predict(loaded.observation_space.sample())[0])


def test_per_prompt_history_and_averaged_weights_come_back(micro_pipeline_folder, tmp_path):
    model = denoising_ppo(micro_pipeline_folder, advantage=PerPromptAdvantage(4, 2), ema_decay=0.5)
    model.learn(6 * STEPS)
    model.save(tmp_path / "model")
    env = VectorEnvAdapter(micro_env(micro_pipeline_folder, 6, samples_per_prompt=2))
    loaded = PPO.load(tmp_path / "model", env=env, device="cpu")
    assert loaded.advantage == model.advantage
    assert all(torch.equal(value, loaded.policy.state_dict()[name]) for name, value in weights(model.policy).items())
    for one, other in zip(model.ema.shadow_params, loaded.ema.shadow_params, strict=True):
        assert torch.equal(one, other)
    loaded.learn(6 * STEPS, reset_num_timesteps=False)


def test_environment_with_other_spaces_is_refused_unless_meant(micro_pipeline_folder, tmp_path):
    model = denoising_rwr(micro_pipeline_folder, advantage=BatchAdvantage())
    model.save(tmp_path / "model")
    other = VectorEnvAdapter(micro_env(micro_pipeline_folder, 6, num_inference_steps=STEPS + 1))
    with pytest.raises(ValueError, match="env must have the observation_space.*custom_objects"):
        type(model).load(tmp_path / "model", env=other)
    meant = {"observation_space": other.observation_space}
    type(model).load(tmp_path / "model", other, "cpu", meant, n_steps=STEPS + 1)


def test_function_has_to_be_given_again(tmp_path):
    small_ppo(learning_rate=lambda remaining: 1e-3 * remaining).save(tmp_path / "model")
    with pytest.raises(ValueError, match="learning_rate must be given to load"):
        PPO.load(tmp_path / "model")
    assert PPO.load(tmp_path / "model", learning_rate=0.5, device="cpu").lr_schedule(1.0) == 0.5


def test_class_of_ones_own_has_to_be_given_again(tmp_path):
    class OwnPolicy(PPO.policy_aliases["MlpPolicy"]):
        pass

    PPO(OwnPolicy, "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(tmp_path / "model")
    with pytest.raises(ValueError, match="policy must be given"):
        PPO.load(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", custom_objects={"policy_class": OwnPolicy}, device="cpu")
    assert isinstance(loaded.policy, OwnPolicy)


class Baseline:
    """An estimator of one's own with a state: the mean of all rewards that it has seen."""

    def __init__(self):
        self.seen = np.zeros(0)

    def __call__(self, rollout):
        self.seen = np.append(self.seen, rollout.rewards)
        return torch.as_tensor(rollout.rewards - self.seen.mean(), dtype=torch.float32)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_state_of_an_estimator_of_ones_own_comes_back(tmp_path):
    model = small_ppo(advantage=Baseline()).learn(32)
    assert len(model.advantage.seen) == 32
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", advantage=Baseline(), device="cpu")
    np.testing.assert_array_equal(loaded.advantage.seen, model.advantage.seen)
    other = PPO.load(tmp_path / "model", advantage=PerPromptAdvantage(), device="cpu")
    assert other.advantage.history == {}, "another estimator begins anew"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyError("own fault")], ids=repr)
def test_error_of_a_policy_is_not_called_a_fault_of_the_file(tmp_path, error):
    class Failing(PPO.policy_aliases["MlpPolicy"]):
        fails = False

        def __init__(self, *arguments, **named):
            if self.fails:
                raise error
            super().__init__(*arguments, **named)

    PPO(Failing, "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(tmp_path / "model")
    Failing.fails = True
    with pytest.raises(type(error)) as caught:
        PPO.load(tmp_path / "model", custom_objects={"policy_class": Failing}, device="cpu")
    assert caught.value is error


def test_memory_that_ends_when_a_state_is_loaded_is_not_called_a_fault_of_the_file(tmp_path, monkeypatch):
    small_ppo().save(tmp_path / "model")

    def full(self, state):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        PPO.load(tmp_path / "model", device="cpu")


class Bomb:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_zip_of_stable_baselines3_is_refused_and_its_bomb_does_not_run(tmp_path):
    model = stable_baselines3.PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0)
    model.bomb = Bomb(tmp_path / "exploded")
    model.save(tmp_path / "theirs")
    for load in (PPO.load, small_ppo().set_parameters):
        with pytest.raises(ValueError, match=r"zip of Stable-Baselines3, whose pickles could execute code"):
            load(tmp_path / "theirs")
    assert not (tmp_path / "exploded").exists()


def rewritten(tmp_path, change=None, tensors=None, extra=None):
    """Return a saved file with other content."""
    small_ppo().save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data, stored = json.loads(archive.read(ALGORITHM)), archive.read(TENSORS)
    if change is not None:
        change(data)
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        archive.writestr(ALGORITHM, json.dumps(data))
        archive.writestr(TENSORS, stored if tensors is None else tensors)
        if extra is not None:
            archive.writestr("extra.pkl", extra)
    return tmp_path / "changed.zip"


CHANGES = {
    "class from a module": lambda data: data["arguments"].update(policy_kwargs={"class": "subprocess.Popen"}),
    "policy from a module": lambda data: data.update(policy="os:system"),
    "unknown space": lambda data: data["observation_space"].update(kind="Popen"),
    "other class": lambda data: data.update({"class": "REINFORCE"}),
    "no counters": lambda data: data.pop("counters"),
    "text as counter": lambda data: data["counters"].update(num_timesteps="0"),
    "bad argument": lambda data: data["arguments"].update(n_steps=0),
    "unknown argument": lambda data: data["arguments"].update(train="never"),
    "no arguments": lambda data: data.update(arguments=3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"must"):
        PPO.load(rewritten(tmp_path, CHANGES[name]))


def test_only_known_counters_are_set(tmp_path):
    path = rewritten(tmp_path, lambda data: data["counters"].update(train=1, policy=2))
    loaded = PPO.load(path, device="cpu")
    assert callable(loaded.train)
    assert isinstance(loaded.policy, torch.nn.Module)


def test_planted_pickles_do_not_run(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    for path in (rewritten(tmp_path, extra=bomb), rewritten(tmp_path, tensors=bomb)):
        with pytest.raises(ValueError, match="must hold"):
            PPO.load(path)
    assert not (tmp_path / "exploded").exists()


def test_folder_is_refused_with_what_reads_a_policy(tmp_path):
    (tmp_path / "policy").mkdir()
    for path in (tmp_path / "policy", str(tmp_path / "policy")):
        with pytest.raises(ValueError, match=r"path must be a file .*policy' is a folder.*DiffusionPolicy\.load"):
            PPO.load(path)


def test_other_algorithm_is_refused(tmp_path):
    small_ppo().save(tmp_path / "model")
    with pytest.raises(ValueError, match="path must hold a REINFORCE; .* holds a 'PPO'"):
        REINFORCE.load(tmp_path / "model")
