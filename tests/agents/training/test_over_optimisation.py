"""The held-out reward and the brake, on points that training drives past the best place."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import points_models
from helpers.micro_agents import brightness, contrast, resume_config
from helpers.points_models import near_one, points_config
from helpers.run_comparison import assert_same_run, rows
from safetensors.torch import load_file
from scipy import stats

from agents import prepare_run, run_training, train_config
from agents.evaluation.intervals import is_higher
from agents.training import command
from agents.training.checkpoint import Checkpoints, latest_checkpoint
from agents.training.monitoring.holdout_reward import HoldoutReward, configured_holdout_reward
from agents.training.monitoring.over_optimisation import OverOptimisationBrake
from rewards import load_reward

NEAR_ONE = "helpers.points_models:near_one"
BRAKED = {"learning_rate": 0.03, "holdout_reward": NEAR_ONE, "stop_at_overoptimisation": True}
"""The held-out reward is best after iteration 3, and the reward rises further in the three iterations after that."""


@pytest.fixture(scope="module")
def braked(tmp_path_factory):
    return run_training(points_config(tmp_path_factory.mktemp("runs") / "braked", **BRAKED))


def test_run_stops_when_the_held_out_reward_falls_while_the_reward_rises(braked):
    table = rows(braked.folder.path)
    holdout = [float(row["eval/holdout_reward_mean"]) for row in table]
    reward = [float(row["eval/reward_mean"]) for row in table]
    assert braked.iterations == 6 < braked.config.total_iterations
    assert int(np.argmax(holdout)) == 3
    assert reward[6] > reward[5] > reward[4] > reward[3]
    assert "best after iteration 3" in braked.stopped_early
    assert braked.best_evaluation == (3, holdout[3])
    summary = json.loads(braked.folder.summary.read_text())
    assert summary["stopped_early"] == braked.stopped_early
    assert (summary["best_iteration"], summary["holdout_reward_best"]) == braked.best_evaluation
    assert (summary["holdout_reward_before"], summary["holdout_reward_after"]) == (holdout[0], holdout[-1])


def test_best_policy_is_that_of_a_run_that_ends_there(braked, tmp_path):
    run_training(points_config(tmp_path, learning_rate=0.03, iterations=3))
    best, expected, last = (
        load_file(folder / "policy" / "policy.safetensors")
        for folder in (braked.folder.best, tmp_path, braked.folder.path)
    )
    assert all(np.array_equal(best[name], expected[name]) for name in expected)
    assert not all(np.array_equal(best[name], last[name]) for name in last)


def test_last_words_say_why_it_stopped_and_what_to_use(braked):
    text = command.summary(braked)
    assert "Stopped early: over-optimisation: the held-out reward was best after iteration 3" in text
    assert "Use the policy after iteration 3, the best by the held-out reward" in text
    assert str(braked.folder.best / "policy") in text


def test_braked_run_stays_ended(braked, capsys):
    run = prepare_run(resume_config(braked.folder.path, iterations=20))
    assert run.was_finished
    assert command.train(run) == 0
    assert "had ended already, after 6 iterations (over-optimisation" in capsys.readouterr().out


def test_run_whose_held_out_reward_rises_goes_on_to_the_end(tmp_path):
    settings = {**BRAKED, "holdout_reward": "helpers.points_models:rightward", "iterations": 6}
    result = run_training(points_config(tmp_path, **settings))
    assert (result.iterations, result.stopped_early) == (6, None)


@pytest.mark.parametrize("evaluation", [3, 6])
def test_run_that_is_stopped_in_an_evaluation_is_resumed_to_the_same_bits(braked, tmp_path, monkeypatch, evaluation):
    calls = []

    def interrupted(points, prompts, metadata):
        calls.append(1)
        if len(calls) == evaluation + 1:
            raise KeyboardInterrupt
        return near_one(points, prompts, metadata)

    interrupted.__name__ = "near_one"
    with monkeypatch.context() as patch:
        patch.setattr(points_models, "near_one", interrupted)
        stopped = run_training(points_config(tmp_path, **BRAKED))
    assert (stopped.iterations, stopped.reward_after) == (evaluation - 1, None)
    run_training(resume_config(tmp_path))
    assert_same_run(tmp_path, braked.folder.path)


def test_run_that_is_killed_before_a_checkpoint_is_resumed_to_the_same_bits(braked, tmp_path, monkeypatch):
    """What is on the disk when the best policy is saved, or the brake has decided, and the checkpoint is not there."""
    finished = Checkpoints.finished

    def kept(self, number):
        if number in (3, 6):
            shutil.copytree(self.folder.parent, tmp_path / f"killed-{number}")
        finished(self, number)

    monkeypatch.setattr(Checkpoints, "finished", kept)
    run_training(points_config(tmp_path / "run", **BRAKED))
    monkeypatch.undo()
    for number in (3, 6):
        killed = tmp_path / f"killed-{number}"
        assert (killed / "best").exists()
        assert latest_checkpoint(killed / "checkpoints").name == f"iteration_{number - 1:06d}"
        run_training(resume_config(killed))
        assert_same_run(killed, braked.folder.path)


@pytest.mark.parametrize(
    ("reward", "holdout", "stops_at"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 0.9, 0.95, 0.9, 0.9], 4),  # it rises alone
        ([0, 1, 1, 1, 1, 1], [0, 1, 0.99, 1, 0.99, 0.98], None),  # neither changes
        ([0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], 4),  # both fall
        ([0, 1, 2, 3, 4, 5], [0, 1, 0.9, 0.9, 1.1, 1.0], None),  # a new best in time
    ],
)
def test_rule_asks_for_three_evaluations_without_a_new_best_and_a_reward_that_changed(reward, holdout, stops_at):
    noise = np.random.default_rng(0).normal(0, 0.1, (2, len(reward), 40))
    reasons: dict[int, str] = {}
    brake = OverOptimisationBrake()
    for place in range(len(reward)):
        run: Any = SimpleNamespace(
            best_evaluation=(int(np.argmax(holdout)), 1.0),
            evaluations=list(enumerate(reward)),
            stop=lambda reason, place=place: reasons.setdefault(place, reason),
        )
        scores = reward[place] + noise[0, place]
        evaluation: Any = SimpleNamespace(
            holdout_rewards=holdout[place] + noise[1, place] - noise[1, place].mean(),
            finite_rewards=lambda scores=scores: scores,
        )
        brake.on_evaluation(run, evaluation)
    assert next(iter(reasons), None) == stops_at


def test_difference_is_a_paired_comparison_of_the_same_seeds():
    rng = np.random.default_rng(0)
    outcomes = []
    for trial in range(40):
        best = rng.normal(0, 5, 30)  # seeds differ far more than the policies do
        now = best - 0.02 * trial + rng.normal(0, 1, 30)
        expected = stats.ttest_rel(best, now).statistic > 2
        assert is_higher(best, now) == expected
        outcomes.append(expected)
    assert not outcomes[0]
    assert outcomes[-1]
    assert not is_higher(best, best)
    assert is_higher(best, best - 1)


@pytest.mark.parametrize("value", [float("nan"), 1e300])
def test_held_out_reward_that_is_not_finite_is_an_error_that_names_it(tmp_path, monkeypatch, value):
    monkeypatch.setattr(points_models, "near_one", lambda points, *_: [0.0] * (len(points) - 1) + [value])
    with pytest.raises(
        ValueError,
        match=r"holdout_reward '.*near_one' must be finite in float32; got .*\(held-out sample 31 of 32, 1 not",
    ):
        run_training(points_config(tmp_path, holdout_reward=NEAR_ONE, non_finite_rewards="drop"))


@pytest.mark.parametrize(
    ("spec", "option", "message"),
    [
        ("aesthetic", "a=1", "^holdout_reward_options of aesthetic must be among .*; got a"),
        ("jpeg_compressibility", "a=1", r"takes no options \(holdout_reward_options\)"),
        ("jpeg_compressibility:1,aesthetic:1", "a=1", "^holdout_reward_options of the weighted sum"),
        ("jpeg_compressibility:1,aesthetic:1", "aesthetic.a=1", "^holdout_reward_options of aesthetic must be among"),
    ],
)
def test_options_of_the_held_out_reward_are_refused_by_their_setting(spec, option, message):
    with pytest.raises(ValueError, match=message):
        configured_holdout_reward(train_config(holdout_reward=spec, holdout_reward_options=(option,)))


def test_held_out_reward_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(points_models, "near_one", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        run_training(points_config(tmp_path, holdout_reward=NEAR_ONE))
    assert f"of holdout_reward={NEAR_ONE!r}" in caught.value.__notes__


def test_scale_of_a_weighted_sum_is_that_of_the_first_samples():
    spec = "helpers.micro_agents:brightness:1,helpers.micro_agents:contrast:0.5"
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 8, 3), dtype=np.uint8)
    images[1] //= 3
    prompts = [("a cat", {})] * 6

    def expected(batch):
        total = np.zeros(6)
        for reward, weight in ((brightness, 1.0), (lambda *one: contrast(*one)[0], 0.5)):
            first = reward(images[0], [], [])
            total += weight * (reward(batch, [], []) - first.mean()) / first.std()
        return total

    holdout = HoldoutReward(load_reward(spec), spec, 4, {})
    for batch in (images[0], images[1], images[1], images[0]):
        np.testing.assert_allclose(holdout(batch, prompts), expected(batch), rtol=1e-6, atol=1e-9)
    resumed = HoldoutReward(load_reward(spec), spec, 4, {})
    resumed.load_state_dict(holdout.state_dict())
    np.testing.assert_allclose(resumed(images[1], prompts), expected(images[1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_at_overoptimisation": True}, "stop_at_overoptimisation needs .* add --holdout-reward"),
        ({"holdout_reward_options": ("a=1",)}, "holdout_reward_options must be empty without holdout_reward.*got a=1"),
        ({"holdout_reward": "aesthetic", "holdout_reward_options": ("a",)}, "holdout_reward_options"),
        ({**BRAKED, "eval_interval": 0}, "eval_interval must be at least 1 with stop_at_overoptimisation"),
        ({**BRAKED, "eval_samples": 7}, "eval_samples must be at least 8 with stop_at_overoptimisation.* got 7"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        train_config(**settings).resolved()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("astetic", "^holdout_reward must be one of .*'astetic'"),
        ("jpeg_compressibility:1,astetic:1", "^holdout_reward must be one of .*'astetic'"),
        ("helpers.micro_agents:no", "^holdout_reward 'helpers.micro_agents:no': module"),
        ("jpeg_compressibility", "jpeg_compressibility scores images"),  # and points are none
        ("helpers.micro_agents:Remembering", "has a state that changes .* no method frozen"),
    ],
)
def test_held_out_reward_that_does_not_fit_is_refused_early_by_its_setting(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepare_run(points_config(tmp_path / "run", holdout_reward=spec))
    assert f"of holdout_reward={spec!r}" in caught.value.__notes__
    assert not (tmp_path / "run").exists()
