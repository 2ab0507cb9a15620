"""Rewards whose scores depend on other samples: several processes give each sample the score that one would.

What is measured and combined is compared with the same reward called on the whole batch.
"""

import json

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from helpers.algorithms import POLICY, collected, logged
from helpers.images import PROMPTS, random_images
from helpers.many_processes import LINEAR, Job, Mishap, again, largest_difference, run_processes, single
from helpers.micro_agents import STEPS, micro_env, micro_policy
from helpers.run_comparison import rows

from agents import PPO, DiffusionPolicy, PerPromptAdvantage, VectorEnvAdapter
from agents.evaluation.evaluate import evaluate
from agents.training.checkpoint import latest_checkpoint
from ddpo_env.deferred_reward import RewardCaller
from rewards import load_reward

SUM = "helpers.micro_agents:brightness:1,helpers.micro_agents:contrast:0.5"
NESTED = "helpers.micro_agents:Pair:2,helpers.micro_agents:contrast:-0.5:raw,helpers.stateful_rewards:Shareable:1"
REWARDS = {
    "standardised": SUM,
    "raw": "helpers.micro_agents:brightness:100:raw,helpers.micro_agents:contrast:1",
    "without a score for some": "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1",
    "nested": NESTED,
    "two stages of its own": "helpers.stateful_rewards:Shareable",
}
SPOTTY = ["a cat", "a bee", "an ant", "a toad"]
"""The last two have a length that `spotty` does not like."""


def micro_envs(model, num_envs, spec, **settings):
    """An environment that scores its samples, and one that only measures them, as one of several processes does."""
    scores, measures = (micro_env(model, num_envs, reward=load_reward(spec), **settings) for _ in range(2))
    measures._caller = RewardCaller(
        in_thread=measures.deferred_rewards, measures=True, non_finite=measures.non_finite_rewards
    )
    return scores, measures


@pytest.mark.parametrize("spec", [SUM, "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1", NESTED])
@pytest.mark.parametrize("history", [0, 2])
def test_evaluation_combines_whole_batches_with_frozen_statistics(micro_pipeline_folder, spec, history):
    """Batches of 3, the last with two samples to spare, as a single process generates and scores them."""
    settings = {"autoreset_mode": AutoresetMode.DISABLED, "non_finite_rewards": "keep"}
    prompts = ["a cat", "a dog", "a fox", "an ant", "a bee", "a cow", "a rat"]
    evaluations, states = [], []
    for env in micro_envs(micro_pipeline_folder, 3, spec, **settings):
        for seed in range(history):
            env.reward(random_images(4, seed), PROMPTS, [{}] * 4)
        before = json.dumps(env.reward.state_dict())
        evaluations.append(evaluate(micro_policy(env), env, prompts, seed=5))
        states.append((json.dumps(env.reward.state_dict()) == before, json.dumps(env.reward.state_dict())))
    expected, mine = evaluations
    np.testing.assert_array_equal(mine.rewards, expected.rewards)
    assert mine.rewards.shape == (7,)
    assert mine.details.keys() == expected.details.keys()
    for name, values in mine.details.items():
        np.testing.assert_array_equal(values, expected.details[name], name)
    assert states[0] == states[1]
    if spec != NESTED:  # a term of it cannot be frozen
        assert states[0][0]
    assert mine.dropped_samples == ("spotty" in spec)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("spec", [SUM, "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1", NESTED])
def test_rollout_that_was_measured_gets_the_rewards_of_one_that_was_scored(micro_pipeline_folder, spec, deferred):
    models = []
    settings = {"prompts": SPOTTY, "non_finite_rewards": "keep", "deferred_rewards": deferred}
    for env in micro_envs(micro_pipeline_folder, 4, spec, **settings):
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
    statistics, other = numbers(mine["components"]["reward"]), numbers(theirs["components"]["reward"])
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
    assert state(one)["components"]["reward"]["statistics"]["helpers.micro_agents:contrast"]["count"] == 24


DROP = {"non_finite_rewards": "drop"}
CHOICES = {
    "groups that processes share": (SUM, {"samples_per_prompt": 4, "train_batch_size": 3, "advantage": "group"}),
    "dropped": ("helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1", DROP),
    "nested": (NESTED, {}),
    "two stages of its own": ("helpers.stateful_rewards:Shareable", {"advantage": "batch"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_keeps_the_statistics_of_one_process(micro_pipeline_folder, tmp_path, name):
    spec, training = CHOICES[name]
    settings = {**LINEAR, "reward": spec, **training}
    expected = single(micro_pipeline_folder, tmp_path / "one", **settings)
    outcome = run_processes(2, Job(str(micro_pipeline_folder), tmp_path / "two", settings))
    assert outcome.codes == [0, 0], outcome.said
    assert outcome.weights[0] == outcome.weights[1]
    assert_alike(tmp_path / "two", expected)
    if "dropped" in name:
        assert sum(int(float(row["rollout/dropped_samples"] or 0)) for row in rows(expected)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 2)])
def test_statistics_go_on_with_another_number_of_processes(micro_pipeline_folder, one, tmp_path, before, after):
    folder = tmp_path / "run"
    # Calls of the reward in a process: 2 before training, then 2 per iteration.
    mishap = Mishap("raise", rank=before - 1, call=6)
    job = Job(str(micro_pipeline_folder), folder, LINEAR | {"reward": SUM}, mishap)
    assert run_processes(before, job).codes == [1] * before
    assert latest_checkpoint(folder / "checkpoints").name == "iteration_000001"
    assert state(folder)["components"]["reward"]["statistics"]["helpers.micro_agents:brightness"]["count"] == 8
    outcome = run_processes(after, again(job))
    assert outcome.codes == [0] * after, outcome.said
    assert_alike(folder, one)


@pytest.mark.slow
def test_score_that_is_missing_ends_all_processes_with_the_same_error(micro_pipeline_folder, tmp_path):
    settings = {"reward": "helpers.micro_agents:brightness:1,helpers.micro_agents:spotty:1"}
    outcome = run_processes(2, Job(str(micro_pipeline_folder), tmp_path / "run", settings))
    assert outcome.codes == [1, 1]
    assert outcome.said[0] == outcome.said[1]
    assert "reward composite must be finite; got nan for prompt" in outcome.said[0]
    assert "helpers.micro_agents:spotty is nan" in outcome.said[0]
