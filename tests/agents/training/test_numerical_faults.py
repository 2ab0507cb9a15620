"""Numerical faults have a defined end: an error that names the fault and the last good state, or a finished run."""

import json

import numpy as np
import pytest
import torch
from helpers import micro_agents
from helpers.micro_agents import brightness, micro_config
from helpers.micro_pipeline import micro_pipeline
from helpers.run_comparison import assert_same_run, rows
from helpers.scripts import MINIATURE, run_script
from safetensors.torch import load_file

from agents.training import command
from agents.training.checkpoint import latest_checkpoint
from agents.training.monitoring.divergence import DivergenceError, spread
from agents.training.preparation import prepare_run, run_training


def assert_finite(folder):
    tensors = load_file(latest_checkpoint(folder / "checkpoints") / "tensors.safetensors")
    assert all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point())


def scoring(score):
    def reward(images, prompts, metadata):
        return np.asarray(score(brightness(images, prompts, metadata)), dtype=np.float64)

    reward.__name__ = "brightness"
    return reward


@pytest.mark.parametrize("score", [np.zeros_like, lambda x: x * 1e30, lambda x: x * 1e-30], ids=["0", "1e30", "1e-30"])
def test_rewards_of_any_scale_train_to_the_end(learner, monkeypatch, tmp_path, score):
    monkeypatch.setattr(micro_agents, "brightness", scoring(score))
    assert run_training(micro_config(learner, tmp_path)).iterations == 3
    assert_finite(tmp_path)


SMALLEST = {"samples_per_iteration": 1, "sample_batch_size": 1, "samples_per_prompt": 1, "updates_per_iteration": 1}


def test_one_sample_an_iteration_and_one_prompt_train_to_the_end(learner, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    settings = {**SMALLEST, "prompts": str(tmp_path / "prompts.txt")}
    assert run_training(micro_config(learner, tmp_path / "run", **settings)).iterations == 3
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize("rate", [1e3, 1e4])
def test_absurd_learning_rate_leaves_a_finite_checkpoint(learner, monkeypatch, capsys, tmp_path, rate):
    run = tmp_path / "run"
    arguments = [*MINIATURE, "--iterations=3", f"--learning-rate={rate}", f"--model={learner}"]
    arguments += ["--lora-rank=0"] if learner == "points" else []
    arguments += ["--reward=helpers.micro_agents:brightness", f"--run-dir={run}"]
    code = run_script("train_ppo", arguments, monkeypatch)
    assert code in (0, 1, 2), "an end that is documented"
    if code == 1:
        assert "error: " in capsys.readouterr().err
        assert (run / "error.txt").exists()
    if code != 2:
        assert_finite(run)


def test_reward_that_is_nan_once_names_the_reward(learner, monkeypatch, tmp_path):
    calls = []
    once = scoring(lambda x: calls.append(1) or (x * np.nan if len(calls) == 6 else x))
    monkeypatch.setattr(micro_agents, "brightness", once)
    with pytest.raises(ValueError, match="finite") as caught:
        run_training(micro_config(learner, tmp_path))
    assert "brightness" in "".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert latest_checkpoint(tmp_path / "checkpoints").name == "iteration_000001"


def test_model_with_weights_that_are_not_numbers_is_refused(monkeypatch, tmp_path, capsys):
    pipeline = micro_pipeline()
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "model")
    arguments = [*MINIATURE, f"--model={tmp_path / 'model'}", f"--run-dir={tmp_path / 'run'}"]
    assert run_script("train_ppo", arguments, monkeypatch) == 2
    assert "error: " in capsys.readouterr().err


class Falling:
    """A reward that collapses after some calls, whatever the policy does."""

    def __init__(self, calls):
        self.left = calls
        self.__name__ = "brightness"

    def __call__(self, images, prompts, metadata):
        self.left -= 1
        return brightness(images, prompts, metadata) - (1e4 if self.left < 0 else 0)


# Calls of the reward: 4 before training, then 2 per iteration.
@pytest.mark.parametrize("stops", [True, False])
def test_collapse_of_the_reward_stops_the_run(learner, monkeypatch, tmp_path, capsys, stops):
    monkeypatch.setattr(micro_agents, "brightness", Falling(6))
    settings = {"iterations": 6, "eval_interval": 0, "eval_samples": 16, "stop_on_divergence": stops}
    config = micro_config(learner, tmp_path, **settings)
    if not stops:
        assert run_training(config).iterations == 6
    else:
        with pytest.raises(DivergenceError, match=r"mean reward fell from .* lower learning_rate"):
            run_training(config)
        assert latest_checkpoint(tmp_path / "checkpoints").name == "iteration_000004"
    assert "warning: the mean reward of iteration 2, " in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [{"eval_samples": 16, "learning_rate": 1e-12}, {"eval_samples": 6}],
    ids=["a policy that has not moved", "a scale from few samples"],
)
def test_rewards_that_training_cannot_have_lowered_stop_no_run(learner, monkeypatch, tmp_path, capsys, settings):
    monkeypatch.setattr(micro_agents, "brightness", Falling(6))
    assert run_training(micro_config(learner, tmp_path, iterations=6, eval_interval=0, **settings)).iterations == 6
    assert "standard deviations" not in capsys.readouterr().out


def test_spread_needs_samples_of_several_prompts_or_of_all_that_there_are():
    rewards, many, few = np.arange(16.0), list("abcd") * 4, list("abc") * 5 + ["a"]
    assert spread(rewards, many, None) == rewards.std()
    assert spread(rewards[:15], many[:15], None) == 0
    assert spread(rewards, few, None) == spread(rewards, few, range(4)) == 0
    assert spread(rewards, few, range(3)) == rewards.std()


@pytest.mark.parametrize("algorithm", ["ppo", "dpo"])
@pytest.mark.parametrize("score", [np.zeros_like, lambda x: x], ids=["constant", "varied"])
def test_run_without_a_gradient_says_that_it_learned_nothing(learner, monkeypatch, capsys, tmp_path, score, algorithm):
    """DPO without a pair makes no update at all."""
    monkeypatch.setattr(micro_agents, "brightness", scoring(score))
    config = micro_config(learner, tmp_path, iterations=2, algorithm=algorithm)
    assert command.train(prepare_run(config)) == 0
    shown, learned = capsys.readouterr().out, score is not np.zeros_like
    assert shown.count("had no gradient") == shown.count("Nothing was learned") == (not learned)
    assert ("load_lora" in shown) == (learned and learner != "points")
    assert json.loads((tmp_path / "summary.json").read_text())["has_learned"] == learned


@pytest.mark.parametrize(("measured", "learned"), [({}, False), ({"train/overflowed_updates": 1.0}, True)])
def test_iteration_whose_updates_all_overflowed_had_a_gradient(tmp_path, measured, learned):
    """float16 begins with a scale that overflows: rewards that are equal are not the cause."""
    run = prepare_run(micro_config("points", tmp_path))
    run._watch_update(measured)
    assert run.has_learned == learned
    run.folder.release()


@pytest.mark.parametrize(("rate", "warnings"), [(2e-3, 0), (3.0, 1)])
def test_update_that_moves_the_policy_absurdly_far_is_warned_of_once(learner, capsys, tmp_path, rate, warnings):
    settings = {"learning_rate": rate, "stop_on_divergence": False, "eval_interval": 0}
    run_training(micro_config(learner, tmp_path, **settings))
    moved = [float(row["train/kl_to_sampling"]) for row in rows(tmp_path) if row["train/kl_to_sampling"]]
    assert (max(moved) > 1) == bool(warnings)
    assert capsys.readouterr().out.count("nats per dimension of a step: lower learning_rate") == warnings


def test_best_evaluation_is_kept(learner, monkeypatch, tmp_path):
    calls = []

    def peak(images, prompts, metadata):
        calls.append(1)  # 2 calls an evaluation or an iteration; the evaluation after iteration 2 is the best
        return brightness(images, prompts, metadata) + (len(calls) in (9, 10))

    peak.__name__ = "brightness"
    monkeypatch.setattr(micro_agents, "brightness", peak)
    run_training(micro_config(learner, tmp_path, iterations=4, eval_interval=1))
    table = [float(row["eval/reward_mean"]) for row in rows(tmp_path)]
    best = table.index(max(table))
    assert 0 < best < 4
    kept = load_file(tmp_path / "best" / "policy" / "policy.safetensors")
    last = load_file(tmp_path / "policy" / "policy.safetensors")
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    assert learner == "points" or (tmp_path / "best" / "lora" / "pytorch_lora_weights.safetensors").exists()


def test_same_settings_twice_give_the_same_bits(whole, learner, tmp_path):
    run_training(micro_config(learner, tmp_path))
    assert_same_run(tmp_path, whole.folder.path)
