"""Checkpoints that are damaged, foreign or not finite: seen, stepped over, never trained on."""

import json

import numpy as np
import pytest
import torch
from helpers.micro_agents import STEPS, micro_config, micro_env, resume_config
from safetensors.torch import load_file, save_file

from agents.algorithms.policy_gradient.ppo import PPO
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter
from agents.training.checkpoint import Checkpoints, latest_checkpoint, load_checkpoint
from agents.training.preparation import run_training

SETTINGS = {"seed": 0, "reward": "brightness"}


class Component:
    """A component with a given state."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return {"state": self.state}

    def load_state_dict(self, state):
        self.state = state["state"]


@pytest.fixture(scope="module")
def model(micro_pipeline_folder):
    env = VectorEnvAdapter(micro_env(micro_pipeline_folder))
    kwargs = {"lora_rank": 1, "guidance_scale": 1.0}
    algorithm = PPO(DiffusionPolicy, env, n_steps=STEPS, batch_size=20, policy_kwargs=kwargs, device="cpu")
    algorithm._setup_learn(1)
    return algorithm


@pytest.fixture
def folder(model, tmp_path):
    """Two checkpoints."""
    checkpoints = Checkpoints(tmp_path, model, {}, interval=1, settings=SETTINGS)
    checkpoints.save(1)
    checkpoints.save(2)
    return tmp_path


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def change_tensor(checkpoint, change):
    file = checkpoint / "tensors.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("policy."))
    save_file(tensors | {name: change(tensors[name])}, file)


def write(name, text):
    return lambda checkpoint: (checkpoint / name).write_text(text)


DAMAGE = {
    "flipped bit of a tensor": lambda one: flip(one / "tensors.safetensors", 0.9),
    "flipped bit of a header": lambda one: flip(one / "tensors.safetensors", 0.0),
    "flipped bit of the state": lambda one: flip(one / "state.json", 0.5),
    "int8": lambda one: change_tensor(one, lambda value: value.to(torch.int8)),
    "NaN": lambda one: change_tensor(one, lambda value: value * torch.nan),
    "shape": lambda one: change_tensor(one, lambda value: value[:0]),
    "truncated": lambda one: (one / "tensors.safetensors").write_bytes((one / "state.json").read_bytes()[:99]),
    "missing tensors": lambda one: (one / "tensors.safetensors").unlink(),
    "missing manifest": lambda one: (one / "manifest.json").unlink(),
    "junk": write("more.pkl", "junk"),
    "list": write("manifest.json", "[]"),
    "wrong types": write("manifest.json", '{"iteration": "2", "settings": 3, "files": []}'),
    "deep": write("manifest.json", "[" * 100_000),
    "not utf-8": lambda one: (one / "manifest.json").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_newest_whole_checkpoint_is_used_and_the_damaged_one_named(folder, damage):
    DAMAGE[damage](folder / "iteration_000002")
    with pytest.warns(UserWarning, match="iteration_000001 is used, without iteration_000002: "):
        assert latest_checkpoint(folder, SETTINGS).name == "iteration_000001"
    DAMAGE[damage](folder / "iteration_000001")
    with pytest.raises(ValueError, match=r"no checkpoint in .* that is whole .*: restore one from a backup, or start"):
        latest_checkpoint(folder, SETTINGS)


def test_checkpoint_of_another_run_is_refused(folder):
    with pytest.raises(ValueError, match=r"it belongs to another run, with seed=0 instead of 1"):
        latest_checkpoint(folder, SETTINGS | {"seed": 1})


@pytest.mark.parametrize("damage", ["int8", "NaN", "shape"])
def test_tensors_are_checked_before_they_are_taken_even_if_nobody_checked_sums(folder, model, damage):
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    DAMAGE[damage](folder / "iteration_000002")
    with pytest.raises((ValueError, FloatingPointError), match=r"does not fit this run: .*(policy\.|diverged)"):
        load_checkpoint(folder / "iteration_000002", model, {})
    assert all(torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("counters", {"num_timesteps": 1, "policy": "x"}, "counters must have the keys"),
        ("counters", [], "counters must have the keys"),
        ("scaler", {"_growth_tracker": 1}, "scaler must"),
        ("optimizer", [{"lr": "1"}], "optimizer"),
        ("episodes", [{"r": "much"}], "episodes must hold numbers"),
        ("env", 5, "does not fit this run"),
    ],
)
def test_state_of_other_names_and_types_sets_nothing(folder, model, key, value, message):
    file = folder / "iteration_000002" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(file.parent, model, {})


def test_arrays_and_tensors_of_components_come_back_as_they_were(model, tmp_path):
    state = {
        "array": np.arange(6.0).reshape(2, 3),
        "scalar": np.float32(0.1),
        "tensors": [torch.ones(2, dtype=torch.bfloat16), {"words": np.array(["a", "bc"])}],
        "plain": [1, None, "text", True, 0.5],
    }
    Checkpoints(tmp_path, model, {"reward": Component(state)}, interval=1).save(1)
    again = Component()
    load_checkpoint(latest_checkpoint(tmp_path), model, {"reward": again})
    assert np.array_equal(again.state["array"], state["array"])
    assert type(again.state["scalar"]) is np.float32
    assert again.state["scalar"] == state["scalar"]
    assert torch.equal(again.state["tensors"][0], state["tensors"][0])
    assert again.state["tensors"][1]["words"].tolist() == ["a", "bc"]
    assert again.state["plain"] == state["plain"]


@pytest.mark.parametrize("state", [{1: "number as a key"}, {"a set": {1}}, object()])
def test_state_that_cannot_be_stored_is_named(model, tmp_path, state):
    with pytest.raises(TypeError, match=r"component\.reward\.state"):
        Checkpoints(tmp_path, model, {"reward": Component(state)}, interval=1).save(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_iteration_with_weights_that_are_not_finite_is_never_finished(model, tmp_path, value):
    checkpoints = Checkpoints(tmp_path, model, {}, interval=2, keep=1)
    checkpoints.finished(1)
    weight = model.policy.trainable_parameters()[0]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] = value
    with pytest.raises(FloatingPointError, match=r"training diverged: 1 of .* policy\..*learning_rate"):
        checkpoints.finished(2)
    checkpoints.restore()
    assert latest_checkpoint(tmp_path).name == "iteration_000001"
    assert torch.equal(model.policy.trainable_parameters()[0], kept)


def test_settings_that_somebody_has_changed_are_named(tmp_path):
    run_training(micro_config("points", tmp_path, iterations=1, eval_interval=0, eval_samples=2))
    file = tmp_path / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("learning_rate: 0.002", "learning_rate: 0.5"))
    with pytest.raises(ValueError, match=r"with learning_rate=0.002 instead of 0.5 in config.yaml"):
        run_training(resume_config(tmp_path, iterations=2))
    file.write_text(text)
    old = latest_checkpoint(tmp_path / "checkpoints") / "manifest.json"
    manifest = json.loads(old.read_text())
    del manifest["settings"]["learning_rate"]  # as versions before this one wrote it
    old.write_text(json.dumps(manifest))
    assert run_training(resume_config(tmp_path, iterations=2)).iterations == 2
