"""The held-out reward and the brake, on points that training drives past the best place."""

import json
import shutil

import numpy as np
import pytest
from helpers import points_models
from helpers.micro_agents import brightness, contrast, resume_config
from helpers.points_models import near_one, points_config
from helpers.run_comparison import assert_same_run, rows
from safetensors.torch import load_file
from scipy import stats

from agents import prepare_run, run_training, train_config
from agents.config.resolve import resolve
from agents.config.settings import LEAST_EVALUATIONS
from agents.evaluation.intervals import is_higher
from agents.training import command
from agents.training.checkpoint import Checkpoints, latest_checkpoint
from agents.training.monitoring.holdout_reward import HoldoutReward, configured_holdout_reward
from agents.training.monitoring.over_optimisation import over_optimisation
from ddpo_env.models.families.points import PointsModel
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
    text = command.summary(braked, PointsModel())
    assert "Stopped early: over-optimisation: the held-out reward was best after iteration 3" in text
    assert "Use the policy after iteration 3, the best by the held-out reward" in text
    assert str(braked.folder.best / "policy") in text


def test_braked_run_stays_ended(braked, capsys):
    run = prepare_run(resume_config(braked.folder.path, iterations=20))
    assert run.was_finished
    assert command.train(run) == 0
    assert "had ended already, after 6 iterations (over-optimisation" in capsys.readouterr().out


def test_run_whose_held_out_reward_rises_goes_on_to_the_end(tmp_path):
    settings = {**BRAKED, "holdout_reward": "helpers.points_models:rightward:1:raw", "iterations": 6}
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


def noisy_scores(means, rng):
    """Scores of 90 samples, `(evaluations, 90)`. Samples differ far more than policies, which go up and down."""
    means = np.asarray(means, float) + rng.normal(0, 0.03, len(means))
    drift = rng.normal(0, 0.25, (len(means), 90)).cumsum(axis=0)
    return means[:, None] + rng.normal(0, 1.3, 90) + drift


def stopping_place(holdout, rewards):
    places = range(1, len(holdout) + 1)
    return next((place - 1 for place in places if over_optimisation(holdout[:place], rewards[:place])), None)


def stopping_places(holdout, rewards, trials=60):
    rng = np.random.default_rng(0)
    return [stopping_place(noisy_scores(holdout, rng), noisy_scores(rewards, rng)) for _ in range(trials)]


RISING = 0.07 * np.arange(31)
"""As fast as the miniature aesthetic rises from one iteration to the next."""


def test_brake_stops_before_a_tenth_of_the_gain_is_lost():
    slopes = np.interp(np.arange(30), [0, 12, 18, 30], [0.07, 0.07, -0.05, -0.05])
    truth = np.append(0, slopes.cumsum())
    places = stopping_places(truth, RISING)
    assert None not in places
    left = truth[places] / truth.max()
    reached = np.array([truth[: place + 1].max() for place in places]) / truth.max()
    assert (left >= 0.9).mean() > 0.65
    assert left.mean() > 0.9
    assert (reached >= 0.9).mean() > 0.95  # it rarely stops too early
    assert np.median(places) - truth.argmax() <= 3


def test_brake_stops_one_evaluation_after_a_sudden_turn():
    truth = 0.13 * np.arange(31)
    truth[18:] = truth[17] - 0.18 * np.arange(1, 14)
    places = stopping_places(truth, 2 * RISING)
    assert None not in places
    assert np.median(places) == 18
    assert min(places) >= 15


@pytest.mark.parametrize(
    ("holdout", "rewards"),
    [
        (RISING, RISING),
        (RISING / 2, RISING),  # slowly from the beginning
        (np.where(RISING < 0.6, 0.2 * RISING, RISING - 0.48), RISING),  # late
        (np.minimum(RISING, 1), np.minimum(RISING, 1)),  # both end to rise at once: training has converged
    ],
)
def test_brake_seldom_stops_a_run_whose_held_out_reward_keeps_pace(holdout, rewards):
    places = stopping_places(holdout, rewards)
    assert sum(place is not None for place in places) <= 0.2 * len(places)


def test_brake_stops_a_run_whose_held_out_reward_falls_from_the_beginning():
    places = stopping_places(-0.5 * RISING, RISING)
    assert None not in places
    assert np.median(places) <= LEAST_EVALUATIONS + 1


def test_rule_needs_its_least_number_of_evaluations():
    falling = [np.full(8, -float(place)) + np.arange(8) for place in range(LEAST_EVALUATIONS)]
    assert over_optimisation(falling[:-1], falling[:-1]) is None
    assert over_optimisation(falling, falling) is not None


def test_samples_without_a_finite_reward_are_left_out_of_the_comparison():
    rng = np.random.default_rng(0)
    holdout = noisy_scores(np.minimum(RISING, 0.7), rng)
    rewards = noisy_scores(RISING, rng)
    expected = stopping_place(holdout, rewards)
    for place in range(len(rewards)):
        rewards[place, place : place + 2] = (
            np.nan
        )  # others at every evaluation, as non_finite_rewards="drop" keeps them
    found = stopping_place(holdout, rewards)
    assert expected is not None
    assert found is not None
    assert abs(found - expected) <= 2
    assert stopping_place(holdout, np.full_like(rewards, np.nan)) is None


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


def test_held_out_reward_is_another_than_the_one_that_is_trained_on():
    same = points_config(None, reward=NEAR_ONE, holdout_reward=NEAR_ONE)
    with pytest.raises(ValueError, match="^holdout_reward must differ from reward, which is trained on; got"):
        resolve(same)
    resolve(same.changed(holdout_reward="helpers.points_models:rightward"))


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
        (
            {**BRAKED, "iterations": 12},
            "eval_interval must be at most 2 with stop_at_overoptimisation.*12 iterations.*got 5",
        ),
        (
            {**BRAKED, "iterations": 5, "eval_interval": 1},
            "iterations must be at least 6 with stop_at_overoptimis.* got 5",
        ),
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
        ("helpers.stateful_rewards:Remembering", "has a state that changes .* no method frozen"),
    ],
)
def test_held_out_reward_that_does_not_fit_is_refused_early_by_its_setting(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepare_run(points_config(tmp_path / "run", holdout_reward=spec))
    assert f"of holdout_reward={spec!r}" in caught.value.__notes__
    assert not (tmp_path / "run").exists()
