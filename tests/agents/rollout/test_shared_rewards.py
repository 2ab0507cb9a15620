"""Rewards whose scores depend on other pictures: several processes give each picture the score that one would.

What is shared out, measured and combined is compared with the same reward called on the whole batch.
"""

import json
from itertools import pairwise

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from helpers.algorithms import POLICY, collected, logged
from helpers.images import PROMPTS, pictures
from helpers.many_processes import LINEAR, Job, Mishap, again, largest_difference, run_processes, single
from helpers.micro_agents import STEPS, Pair, Shareable, contrast, micro_env, micro_policy
from helpers.run_comparison import rows

from agents import PPO, DiffusionPolicy, PerPromptAdvantage, VectorEnvAdapter
from agents.evaluation.evaluate import evaluate
from agents.training.checkpoint import latest_checkpoint
from rewards import (
    MEASUREMENT,
    SharedReward,
    StatefulReward,
    TwoStageReward,
    evaluate_reward,
    images_only,
    load_reward,
    shared,
    unshared,
)
from rewards.composite import Composite

SUM = "helpers.micro_agents:brightness:1,helpers.micro_agents:contrast:0.5"
NESTED = "helpers.micro_agents:Pair:2,helpers.micro_agents:contrast:-0.5:raw,helpers.micro_agents:Shareable:1"
REWARDS = {
    "standardised": SUM,
    "raw": "helpers.micro_agents:brightness:100:raw,helpers.micro_agents:contrast:1",
    "without a score for some": "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1",
    "nested": NESTED,
    "two stages of its own": "helpers.micro_agents:Shareable",
}
SPOTTY = ["a cat", "a bee", "an ant", "a toad"]
"""The last two have a length that `spotty` does not like."""


def in_parts(reward, images, prompts, edges, non_finite="keep"):
    """Scores and details of a batch that several callers have measured, some rows each."""
    asked = shared(reward)
    gathered = {}
    for start, stop in pairwise(edges):
        part = images[start:stop], prompts[start:stop], [{}] * (stop - start)
        scores, details = evaluate_reward(asked, *part, non_finite=non_finite)
        assert scores.tolist() == [0] * (stop - start)
        for name, values in details.items():
            gathered.setdefault(name, []).extend(values)
    return asked.combined(gathered, prompts, non_finite)


@pytest.mark.parametrize("edges", [(0, 2, 4), (0, 1, 1, 4), (0, 4)])
@pytest.mark.parametrize("spec", REWARDS.values(), ids=REWARDS)
def test_measured_in_parts_and_combined_is_scored_as_a_whole(spec, edges):
    together, apart = load_reward(spec), load_reward(spec)
    for seed in range(3):
        images = pictures(4, seed)
        expected, known = evaluate_reward(together, images, SPOTTY, [{}] * 4, non_finite="keep")
        scores, details = in_parts(apart, images, SPOTTY, edges)
        np.testing.assert_array_equal(scores, expected)
        assert json.dumps(details, sort_keys=True) == json.dumps(known, sort_keys=True)  # NaN equals NaN here
        assert apart.state_dict() == together.state_dict()
        assert len(set(scores[np.isfinite(scores)])) > 1


def test_measuring_leaves_statistics_as_they_are():
    reward = load_reward(NESTED)
    evaluate_reward(reward, pictures(4), PROMPTS, [{}] * 4)
    before = json.dumps(reward.state_dict())
    _, details = evaluate_reward(SharedReward(reward), pictures(4, 1), PROMPTS, [{}] * 4)
    assert json.dumps(reward.state_dict()) == before
    assert "helpers.micro_agents:Pair/helpers.micro_agents:contrast" in details
    assert "helpers.micro_agents:Pair" not in details, "it is not known yet"


def test_statistics_of_a_sum_inside_a_sum_are_frozen_with_it():
    reward = load_reward(NESTED)
    evaluate_reward(reward, pictures(4), PROMPTS, [{}] * 4)
    before = json.dumps(reward.state_dict()["rewards"]["helpers.micro_agents:Pair"])
    with reward.frozen():
        evaluate_reward(reward, pictures(4, 1), PROMPTS, [{}] * 4)
    assert json.dumps(reward.state_dict()["rewards"]["helpers.micro_agents:Pair"]) == before
    evaluate_reward(reward, pictures(4, 1), PROMPTS, [{}] * 4)
    assert json.dumps(reward.state_dict()["rewards"]["helpers.micro_agents:Pair"]) != before


def test_sum_inside_a_sum_is_standardised_in_its_turn():
    inner, outer = Pair(), load_reward(NESTED)
    images = pictures(4)
    own = inner(images, PROMPTS, [{}] * 4)[0]
    above = images.mean((1, 2, 3)) / 255
    above -= above.mean()
    expected = 2 * (own - own.mean()) / own.std() - 0.5 * images.std((1, 2, 3)) + above / above.std()
    scores, details = outer(images, PROMPTS, [{}] * 4)
    np.testing.assert_allclose(scores, expected)
    assert details["helpers.micro_agents:Pair"] == own.tolist()
    assert details["helpers.micro_agents:Shareable/seen"] == [4] * 4


def test_score_that_is_not_finite_is_the_error_of_a_single_process():
    reward = "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1"
    with pytest.raises(ValueError, match="got nan for prompt 'an ant'.*helpers.micro_agents:spotty is nan") as expected:
        evaluate_reward(load_reward(reward), pictures(4), SPOTTY, [{}] * 4)
    with pytest.raises(ValueError, match="composite must be finite") as caught:
        in_parts(load_reward(reward), pictures(4), SPOTTY, (0, 2, 4), non_finite="raise")
    assert str(caught.value) == str(expected.value)


class Broken(Shareable):
    def measure(self, images, prompts, metadata):
        return [1.0, 2.0]

    def combine(self, measurements):
        raise KeyError("no idea")


def test_mistakes_in_the_two_stages_name_the_reward(monkeypatch):
    with pytest.raises(ValueError, match="reward Broken: measure must return 4 measurements, one a picture; got 2"):
        in_parts(Broken(), pictures(4), PROMPTS, (0, 4))
    with pytest.raises(KeyError, match="no idea") as caught:
        in_parts(Broken(), pictures(2), PROMPTS[:2], (0, 2))
    assert caught.value.__notes__ == ["raised by the reward Broken, combining 2 measurements"]
    monkeypatch.setattr(Shareable, "combine", lambda self, measurements: [1.0])
    with pytest.raises(ValueError, match=r"reward Shareable must return shape \(4,\), one score a picture; got \(1,\)"):
        in_parts(Shareable(), pictures(4), PROMPTS, (0, 4))


def test_only_rewards_of_two_stages_are_asked_otherwise():
    assert shared(contrast) is contrast is unshared(contrast)
    assert isinstance(Composite("jpeg_compressibility:1"), TwoStageReward)
    reward = Shareable()
    assert unshared(shared(reward)) is reward
    assert not isinstance(shared(reward), StatefulReward), "the reward itself is what a checkpoint holds"
    with pytest.raises(ValueError, match="scores pictures, a uint8 array"):
        evaluate_reward(shared(images_only(type("P", (Shareable,), {}))()), np.zeros((2, 2)), PROMPTS[:2], [{}] * 2)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("helpers.micro_agents:Remembering", "Remembering"),
        (
            "helpers.micro_agents:brightness:1,helpers.micro_agents:Remembering:1:raw",
            "helpers.micro_agents:Remembering",
        ),
    ],
)
def test_state_that_processes_could_not_share_is_refused(spec, name):
    with pytest.raises(ValueError, match=rf"^reward {name} keeps a state.*it must have measure\(.*combine\("):
        shared(load_reward(spec))


def both_rewards(spec):
    reward, other = load_reward(spec), load_reward(spec)
    return reward, SharedReward(other)


@pytest.mark.parametrize("spec", [SUM, "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1", NESTED])
@pytest.mark.parametrize("history", [0, 2])
def test_evaluation_combines_whole_batches_with_frozen_statistics(micro_pipeline_folder, spec, history):
    """Batches of 3 of which the last has two pictures to spare, as a single process draws and scores them."""
    settings = {"autoreset_mode": AutoresetMode.DISABLED, "non_finite_rewards": "keep"}
    prompts = ["a cat", "a dog", "a fox", "an ant", "a bee", "a cow", "a rat"]
    evaluations, states = [], []
    for reward in both_rewards(spec):
        whole = unshared(reward)
        for seed in range(history):
            whole(pictures(4, seed), PROMPTS, [{}] * 4)
        before = json.dumps(whole.state_dict())
        env = micro_env(micro_pipeline_folder, 3, reward=reward, **settings)
        evaluations.append(evaluate(micro_policy(env), env, prompts, seed=5))
        states.append((json.dumps(whole.state_dict()) == before, json.dumps(whole.state_dict())))
    expected, mine = evaluations
    np.testing.assert_array_equal(mine.rewards, expected.rewards)
    assert mine.rewards.shape == (7,)
    assert mine.details.keys() == expected.details.keys()
    for name, values in mine.details.items():
        np.testing.assert_array_equal(values, expected.details[name], name)
    assert states[0] == states[1]
    if spec != NESTED:  # of which a part does not offer to be frozen
        assert states[0][0]
    assert mine.dropped_samples == ("spotty" in spec)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("spec", [SUM, "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1", NESTED])
def test_rollout_that_was_measured_gets_the_rewards_of_one_that_was_scored(micro_pipeline_folder, spec, deferred):
    models = []
    for reward in both_rewards(spec):
        env = micro_env(
            micro_pipeline_folder,
            4,
            prompts=SPOTTY,
            reward=reward,
            non_finite_rewards="keep",
            deferred_rewards=deferred,
        )
        model = PPO(
            DiffusionPolicy,
            VectorEnvAdapter(env),
            n_steps=3 * STEPS,
            batch_size=4,
            advantage=PerPromptAdvantage(8, 2),
            non_finite_rewards="drop",
            policy_kwargs=POLICY,
            seed=0,
            device="cpu",
        )
        models.append(collected(model))
    expected, mine = models
    np.testing.assert_array_equal(mine.rollout_buffer.rewards, expected.rollout_buffer.rewards)
    assert mine.rollout_buffer.advantages.equal(expected.rollout_buffer.advantages)
    assert logged(mine) == logged(expected)
    assert "reward/helpers.micro_agents:contrast" in logged(mine) or spec != SUM
    assert not any(MEASUREMENT in name for name in logged(mine))
    episodes = [[episode["r"] for episode in model.ep_info_buffer] for model in (mine, expected)]
    assert episodes[0] == episodes[1]
    assert np.std(episodes[0]) > 0
    assert (logged(mine)["rollout/dropped_samples"] > 0) == ("spotty" in spec)


def state(folder):
    return json.loads((latest_checkpoint(folder / "checkpoints") / "state.json").read_text())


def numbers(value):
    """All numbers of a state, in order."""
    if isinstance(value, dict):
        return [number for name in sorted(value) for number in numbers(value[name])]
    return [number for one in value for number in numbers(one)] if isinstance(value, list) else [value]


def assert_alike(folder, expected):
    """Weights, metrics, statistics and noted episodes are those of another run, up to rounding.

    A rounding may be one level of one pixel, 1e-6 in brightness, of which dividing by a small deviation makes 1e-4.
    """
    assert largest_difference(folder, expected) < 1e-5
    for mine, theirs in zip(rows(folder), rows(expected), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"train/ratio_deviation"}:
            if mine[name] and not name.startswith("time/"):
                slack = 1e-6 if name.startswith("train/") else 1e-3
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=slack), name
    mine, theirs = state(folder), state(expected)
    statistics, other = numbers(mine["parts"]["reward"]), numbers(theirs["parts"]["reward"])
    assert len(statistics) >= 2
    assert statistics == pytest.approx(other, rel=1e-3, abs=1e-6)
    returns = [[episode["r"] for episode in one["episodes"]] for one in (mine, theirs)]
    assert returns[0] == pytest.approx(returns[1], rel=1e-3, abs=1e-3)
    assert np.std(returns[0]) > 2e-3


@pytest.fixture(scope="module")
def one(micro_pipeline_folder, tmp_path_factory):
    """The run of one process with a sum that is standardised."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return single(micro_pipeline_folder, folder, **LINEAR, reward=SUM)


def test_two_processes_keep_the_statistics_of_one(micro_pipeline_folder, one, tmp_path):
    outcome = run_processes(2, Job(str(micro_pipeline_folder), tmp_path / "run", LINEAR | {"reward": SUM}))
    assert outcome.codes == [0, 0], outcome.said
    assert outcome.weights[0] == outcome.weights[1]
    assert outcome.said[0] == outcome.said[1]
    assert_alike(tmp_path / "run", one)
    assert state(one)["parts"]["reward"]["statistics"]["helpers.micro_agents:contrast"]["count"] == 24


DROP = {"non_finite_rewards": "drop"}
CHOICES = {
    "waited for": (SUM, {"overlap_rewards": False}),
    "groups that processes share": (SUM, {"samples_per_prompt": 4, "train_batch_size": 3, "advantage": "group"}),
    "dropped": ("helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1", DROP),
    "dropped, waited for": (
        "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1",
        DROP | {"overlap_rewards": False},
    ),
    "nested": (NESTED, {}),
    "two stages of its own": ("helpers.micro_agents:Shareable", {"advantage": "batch"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_keeps_the_statistics_of_one_process(micro_pipeline_folder, tmp_path, name):
    spec, training = CHOICES[name]
    groups = {**LINEAR, "reward": spec, **training}
    expected = single(micro_pipeline_folder, tmp_path / "one", **groups)
    outcome = run_processes(2, Job(str(micro_pipeline_folder), tmp_path / "two", groups))
    assert outcome.codes == [0, 0], outcome.said
    assert outcome.weights[0] == outcome.weights[1]
    assert_alike(tmp_path / "two", expected)
    if "dropped" in name:
        assert sum(int(float(row["rollout/dropped_samples"] or 0)) for row in rows(expected)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 2)])
def test_statistics_go_on_with_another_number_of_processes(micro_pipeline_folder, one, tmp_path, before, after):
    folder = tmp_path / "run"
    # Calls of the reward in a process: 2 before training, then 2 an iteration.
    mishap = Mishap("raise", rank=before - 1, call=6)
    job = Job(str(micro_pipeline_folder), folder, LINEAR | {"reward": SUM}, mishap)
    assert run_processes(before, job).codes == [1] * before
    assert latest_checkpoint(folder / "checkpoints").name == "iteration_000001"
    assert state(folder)["parts"]["reward"]["statistics"]["helpers.micro_agents:brightness"]["count"] == 8
    outcome = run_processes(after, again(job))
    assert outcome.codes == [0] * after, outcome.said
    assert_alike(folder, one)


@pytest.mark.slow
def test_score_that_is_missing_ends_all_processes_with_the_same_error(micro_pipeline_folder, tmp_path):
    groups = {"reward": "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1"}
    outcome = run_processes(2, Job(str(micro_pipeline_folder), tmp_path / "run", groups))
    assert outcome.codes == [1, 1]
    assert outcome.said[0] == outcome.said[1]
    assert "reward composite must be finite; got nan for prompt" in outcome.said[0]
    assert "helpers.micro_agents:spotty is nan" in outcome.said[0]
