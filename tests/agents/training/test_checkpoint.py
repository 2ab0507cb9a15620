"""Checkpoints: everything is in them, a kill at any moment leaves a whole one, and nothing in them is code."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.micro_agents import STEPS, files_below, micro_env, weights
from safetensors.torch import load_file

import agents.training.checkpoint
from agents.algorithms.advantages import PerPromptAdvantage
from agents.algorithms.policy_gradient.ppo import PPO
from agents.policy.diffusion_policy import DiffusionPolicy
from agents.rollout.vec_env import VectorEnvAdapter
from agents.training.checkpoint import Checkpoints, iterations_done, latest_checkpoint, load_checkpoint


class Killed(BaseException):
    """Ends everything, as a signal would."""


class Curve:
    """A component with a state of its own."""

    def __init__(self):
        self.values = []

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state):
        self.values = list(state["values"])


def save_checkpoint(folder, iteration, algorithm, components, keep):
    Checkpoints(folder, algorithm, components, interval=1, keep=keep).save(iteration)
    return latest_checkpoint(folder)


def new_algorithm(folder, seed=0):
    env = VectorEnvAdapter(micro_env(folder, samples_per_prompt=2))
    model = PPO(
        DiffusionPolicy,
        env,
        n_steps=STEPS,
        batch_size=2 * STEPS,
        n_epochs=1,
        gamma=1.0,
        learning_rate=1e-2,
        clip_range=1e-2,
        timestep_fraction=0.5,
        advantage=PerPromptAdvantage(8, 2),
        policy_kwargs={"lora_rank": 0 if folder == "points" else 1, "guidance_scale": 1.0},
        seed=seed,
        device="cpu",
    )
    model.callback = model._setup_learn(1)[1]
    return model


def iterate(model, count):
    for _ in range(count):
        assert model.iterate(model.callback, 1, 10**6)


def everything(model):
    """All that the next iteration depends on, in a form that can be compared."""
    optimizer = model.policy.optimizer.state_dict()
    return {
        "weights": [value.tolist() for value in weights(model.policy).values()],
        "optimizer": {
            (index, name): torch.as_tensor(value).tolist()
            for index, values in optimizer["state"].items()
            for name, value in values.items()
        },
        "history": {prompt: list(values) for prompt, values in model.advantage.history.items()},
        "counters": (model.num_timesteps, model._n_updates),
        "own generators": model.generator_state(),
        "observation": [value.tolist() for value in model._last_obs.values()],
        "prompts": [info["prompt"] for info in model.env.reset_infos],
        "generators": [generator.random() for generator in model.env.vector_env.np_random],
        "episodes": [(episode["r"], episode["l"]) for episode in model.ep_info_buffer],
    }


@pytest.mark.parametrize("iterations", [0, 2])
def test_loaded_algorithm_goes_on_as_the_saved_one(micro_pipeline_folder, tmp_path, iterations):
    first, curve = new_algorithm(micro_pipeline_folder), Curve()
    iterate(first, iterations)
    curve.values = [1.5, 2.5]
    checkpoint = save_checkpoint(tmp_path, iterations, first, {"curve": curve}, keep=1)
    iterate(first, 2)
    expected = everything(first)
    second, again = new_algorithm(micro_pipeline_folder, seed=9), Curve()
    iterate(second, 1)
    load_checkpoint(checkpoint, second, {"curve": again})
    assert again.values == [1.5, 2.5]
    iterate(second, 2)
    assert everything(second) == expected


def test_loaded_adapter_is_the_one_that_goes_on_training(micro_pipeline_folder, tmp_path):
    first = new_algorithm(micro_pipeline_folder)
    iterate(first, 1)
    save_checkpoint(tmp_path, 1, first, {}, keep=1)
    second = new_algorithm(micro_pipeline_folder, seed=9)
    names = [name for name, _ in second.policy.named_parameters()]
    load_checkpoint(latest_checkpoint(tmp_path), second, {})
    assert [name for name, _ in second.policy.named_parameters()] == names
    before = weights(second.policy)
    assert all(torch.equal(value, before[name]) for name, value in weights(first.policy).items())
    iterate(second, 1)
    assert all(not torch.equal(value, before[name]) for name, value in weights(second.policy).items())
    optimized = {id(parameter) for group in second.policy.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in second.policy.trainable_parameters()}


def test_nothing_in_a_checkpoint_can_execute_code(tmp_path, monkeypatch):
    model = new_algorithm("points")
    iterate(model, 1)
    checkpoint = save_checkpoint(tmp_path, 1, model, {"curve": Curve()}, keep=1)
    assert files_below(checkpoint) == {"tensors.safetensors", "state.json", "manifest.json"}
    json.loads((checkpoint / "state.json").read_text())
    load_file(checkpoint / "tensors.safetensors")

    def refuse(*arguments, **keywords):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    load_checkpoint(checkpoint, model, {"curve": Curve()})


def test_last_k_are_kept(tmp_path):
    model = new_algorithm("points")
    for iteration in (1, 2, 3, 10):
        assert iterations_done(save_checkpoint(tmp_path, iteration, model, {}, keep=2)) == iteration
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iteration_000003", "iteration_000010"]
    assert latest_checkpoint(tmp_path).name == "iteration_000010"


def test_folder_without_a_whole_checkpoint_is_a_clear_error(tmp_path):
    (tmp_path / ".iteration_000004.part").mkdir()
    (tmp_path / "iteration_best").mkdir()
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="resume: there is no checkpoint in"):
            latest_checkpoint(folder)


def torn(function, name, text):
    """`function`, but when it comes to a path with `name`, half of its work is done and the process is gone."""

    def kill(first, *arguments, **keywords):
        paths = [first, *arguments]
        if any(name in str(path) for path in paths if isinstance(path, str | Path)):
            for path in paths:
                if isinstance(path, Path) and text:
                    path.write_bytes(text)
            raise Killed
        return function(first, *arguments, **keywords)

    return kill


MOMENTS = {
    "while tensors are written": (agents.training.checkpoint, "save_file", "tensors.safetensors", b"\x10\x00half"),
    "while JSON is written": (agents.training.checkpoint, "write_file", "state.json", b'{"half'),
    "before the new one has its name": (Path, "rename", ".iteration_000002.", b""),
    "before the old one is deleted": (Path, "rename", "checkpoints/iteration_000001", b""),
    "while the old one is deleted": (shutil, "rmtree", ".iteration_000001.", b""),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    folder = tmp_path / "checkpoints"
    model = new_algorithm("points")
    iterate(model, 1)
    save_checkpoint(folder, 1, model, {}, keep=1)
    after_one = weights(model.policy)
    iterate(model, 1)
    after_two = weights(model.policy)
    owner, name, path, text = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, torn(getattr(owner, name), path, text))
        with pytest.raises(Killed):
            save_checkpoint(folder, 2, model, {}, keep=1)
    if moment == "while the old one is deleted":
        next(folder.glob(".iteration_000001.*/tensors.safetensors")).unlink()
    latest = latest_checkpoint(folder)
    resumed = new_algorithm("points", seed=9)
    load_checkpoint(latest, resumed, {})
    expected = {1: after_one, 2: after_two}[iterations_done(latest)]
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.policy).items())
    assert iterations_done(latest) == (2 if "old one" in moment else 1)
    iterate(resumed, 2)
    save_checkpoint(folder, 3, resumed, {}, keep=1)
    assert [path.name for path in folder.iterdir()] == ["iteration_000003"]


def test_checkpoint_of_the_same_iteration_is_replaced_whole(tmp_path):
    model = new_algorithm("points")
    save_checkpoint(tmp_path, 1, model, {}, keep=1)
    iterate(model, 1)
    save_checkpoint(tmp_path, 1, model, {}, keep=1)
    saved = load_file(latest_checkpoint(tmp_path) / "tensors.safetensors")
    for name, value in weights(model.policy).items():
        assert torch.equal(saved[f"policy.{name}"], value)


@pytest.mark.parametrize("lost", ["scaler", "env", "components"])
def test_checkpoint_of_an_older_version_is_a_clear_error(tmp_path, lost):
    model = new_algorithm("points")
    file = save_checkpoint(tmp_path, 0, model, {"curve": Curve()}, keep=1) / "state.json"
    state = json.loads(file.read_text())
    del state[lost]
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=rf"checkpoint .*iteration_000000' has no '{lost}': an older version"):
        load_checkpoint(file.parent, model, {"curve": Curve()})


def test_last_finished_iteration_is_kept_in_memory_until_it_is_needed(tmp_path):
    model, curve = new_algorithm("points"), Curve()
    save_checkpoint(tmp_path, 0, model, {"curve": curve}, keep=1)
    checkpoints = Checkpoints(tmp_path, model, {"curve": curve}, interval=3, keep=1)
    for iteration in (1, 2):
        iterate(model, 1)
        curve.values.append(iteration)
        checkpoints.finished(iteration)
    after_two = weights(model.policy)
    iterate(model, 1)
    curve.values.append(3)
    assert latest_checkpoint(tmp_path).name == "iteration_000000"
    checkpoints.restore()
    assert latest_checkpoint(tmp_path).name == "iteration_000002"
    assert curve.values == [1, 2]
    assert all(torch.equal(value, after_two[name]) for name, value in weights(model.policy).items())
    iterate(model, 1)
    checkpoints.finished(3)
    assert latest_checkpoint(tmp_path).name == "iteration_000003"


def test_checkpoint_of_another_batch_is_refused(tmp_path):
    save_checkpoint(tmp_path, 0, new_algorithm("points"), {}, keep=1)
    other = PPO(
        DiffusionPolicy,
        VectorEnvAdapter(micro_env("points", num_envs=2)),
        n_steps=STEPS,
        advantage=PerPromptAdvantage(8, 2),
        policy_kwargs={"lora_rank": 0, "guidance_scale": 1.0},
        device="cpu",
    )
    with pytest.raises(ValueError, match="num_envs=2"):
        load_checkpoint(latest_checkpoint(tmp_path), other, {})
