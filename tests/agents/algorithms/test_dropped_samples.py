"""Samples without a score, dropped: everything is as if they had not been sampled, and their number is logged."""

import numpy as np
import pytest
import torch
from helpers.algorithms import POLICY, collected, logged
from helpers.micro_agents import STEPS, brightness, micro_env, stir, weights
from helpers.rollouts import rollout

from agents import (
    PPO,
    REINFORCE,
    RWR,
    BatchAdvantage,
    DiffusionPolicy,
    GeneralizedAdvantage,
    GroupRelativeAdvantage,
    LeaveOneOutAdvantage,
    PerPromptAdvantage,
    RawReturn,
    VectorEnvAdapter,
)
from agents.rollout.buffer import DROPPED

ENVS = 6
LOST = [1, 3]
KEPT = [0, 2, 4, 5]


class LosesSome:
    """Brightness and a detail; but NaN and infinity in some rows of a call."""

    def __init__(self, lost=LOST):
        self.lost = lost

    def __call__(self, images, prompts, metadata):
        scores = brightness(images, prompts, metadata)
        lost = [row for row in self.lost if row < len(scores)]
        scores[lost] = np.resize([np.nan, np.inf, -np.inf], len(lost))
        return scores, {"doubled": 2 * scores}


def algorithm(kind, model, num_envs=ENVS, lost=LOST, deferred=False, policy=None, **arguments):
    env = micro_env(
        model,
        num_envs,
        samples_per_prompt=num_envs // 2,
        reward=LosesSome(lost),
        non_finite_rewards="keep",
        deferred_rewards=deferred,
    )
    settings = {
        "n_steps": STEPS,
        "gamma": 1.0,
        "gae_lambda": 0.9,
        "learning_rate": 1e-2,
        "timestep_fraction": 0.8,
        "advantage": BatchAdvantage(),
        "non_finite_rewards": "drop",
        "policy_kwargs": POLICY | (policy or {}),
        "seed": 0,
        "device": "cpu",
    }
    built = kind(DiffusionPolicy, VectorEnvAdapter(env), **settings | arguments)
    stir(built.policy, 0.05)
    return built


def refilled(smaller, larger):
    """Fill the smaller algorithm's buffer, step by step, with the episodes that the larger one kept."""
    smaller._setup_learn(1)
    smaller._update_current_progress_remaining(0, 1)
    smaller.num_timesteps = smaller.n_steps * smaller.n_envs
    source, target = larger.rollout_buffer, smaller.rollout_buffer
    for step in range(source.buffer_size):
        rows = source[step * ENVS + np.array(KEPT)]
        target.add(
            rows.observations,
            rows.actions,
            source.rewards[step, KEPT],
            source.episode_starts[step, KEPT],
            rows.values,
            rows.log_probs,
            [source.contexts[row] for row in range(len(KEPT))],
        )
    target.finish(source.last_values[KEPT], source.last_dones[KEPT])
    target.set_monte_carlo_returns()
    target.advantages = smaller.step_weights(target)
    return smaller


CRITIC = {"policy": {"critic": True}}
CASES = {
    "ppo, per prompt": (PPO, {"batch_size": 12, "n_epochs": 2, "advantage": PerPromptAdvantage(8, 2)}),
    "ppo, batch, KL": (PPO, {"batch_size": 12, "n_epochs": 1, "kl_coef": 0.5}),
    "ppo, group": (PPO, {"batch_size": 12, "n_epochs": 1, "advantage": GroupRelativeAdvantage()}),
    "ppo, leave one out": (PPO, {"batch_size": 12, "n_epochs": 1, "advantage": LeaveOneOutAdvantage()}),
    "ppo, gae": (PPO, {"batch_size": 12, "n_epochs": 2, "advantage": GeneralizedAdvantage(), **CRITIC}),
    "ppo, critic": (PPO, {"batch_size": 12, "n_epochs": 1, "recompute_log_probs": True, **CRITIC}),
    "reinforce": (REINFORCE, {"advantage": RawReturn()}),
    "rwr": (RWR, {"n_epochs": 2, "batch_size": 3, "kl_coef": 0.5}),
    "rwr sparse": (RWR, {"n_epochs": 2, "weighting": "percentile", "percentile": 50.0, **CRITIC}),
}


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_update_is_that_of_a_rollout_of_the_other_episodes(micro_pipeline_folder, case, deferred):
    kind, arguments = CASES[case]
    larger = algorithm(kind, micro_pipeline_folder, deferred=deferred, **arguments)
    fewer = {"batch_size": arguments["batch_size"] * len(KEPT) // ENVS} if "batch_size" in arguments else {}
    memory = {"advantage": PerPromptAdvantage(8, 2)} if "per prompt" in case else {}
    smaller = algorithm(kind, micro_pipeline_folder, len(KEPT), lost=[], **arguments | fewer | memory)
    refilled(smaller, collected(larger))
    credit = larger.rollout_buffer.advantages
    assert torch.equal(credit[:, KEPT], smaller.rollout_buffer.advantages)
    assert credit[:, KEPT].std() > 0
    before = weights(larger.policy)
    for model in (larger, smaller):
        model.generators.seed(5)
        model.train()
    assert larger._n_updates == smaller._n_updates >= 1
    mine, expected = weights(larger.policy), weights(smaller.policy)
    assert all(torch.equal(value, expected[name]) for name, value in mine.items())
    assert any(not torch.equal(value, before[name]) for name, value in mine.items())
    metrics = [{n: v for n, v in logged(model).items() if n.startswith("train/")} for model in (larger, smaller)]
    for name in [name for name in metrics[0] if name.startswith("train/kl_to_")]:
        drift = [one.pop(name) for one in metrics]  # measured in calls of other sizes
        assert drift[0] == pytest.approx(drift[1], rel=1e-4, abs=1e-8), name
    assert metrics[0] == metrics[1]


ESTIMATORS = [PerPromptAdvantage, BatchAdvantage, GroupRelativeAdvantage, LeaveOneOutAdvantage, RawReturn]


@pytest.mark.parametrize("estimator", [*ESTIMATORS, GeneralizedAdvantage])
def test_advantages_over_several_rounds_are_those_of_the_other_episodes(estimator):
    """Two rounds of episodes, each of which loses another sub-environment, against a rollout of what is left."""
    returns = np.array([[1.0, np.nan, 4.0, 2.5, 0.0], [np.inf, 7.0, 3.0, 5.0, 1.0]])
    prompts = np.array([["a cat", "a cat", "a dog", "a cat", "a dog"]] * 2)
    kept = np.isfinite(returns)
    mine, other = rollout(returns, prompts), rollout(returns[kept].reshape(2, 4), prompts[kept].reshape(2, 4))
    mine.drop_non_finite()
    advantages, expected = (estimator()(one) for one in (mine, other))
    rows = torch.as_tensor(kept.repeat(3, axis=0))
    assert torch.equal(advantages[rows], expected.flatten())
    assert mine.contexts == other.contexts
    np.testing.assert_array_equal(mine.segment_returns(), other.segment_returns())
    assert len(mine.final_steps()) == 8
    assert mine.dropped_contexts == ["a cat", "a cat"]
    assert (mine.segments == DROPPED).sum() == 6


def test_statistics_of_a_prompt_do_not_hear_of_dropped_samples():
    one = rollout([1.0, np.nan, 3.0], ["a cat"] * 3)
    one.drop_non_finite()
    estimator = PerPromptAdvantage(8, 2)
    estimator(one)
    assert list(estimator.history["a cat"]) == [1.0, 3.0]


@pytest.mark.parametrize("estimator", [GroupRelativeAdvantage(), LeaveOneOutAdvantage()])
def test_sample_whose_whole_group_was_dropped_has_no_advantage(estimator):
    one = rollout([1.0, np.nan, 3.0, 5.0], ["a cat", "a cat", "a dog", "a dog"])
    one.drop_non_finite()
    advantages = estimator(one)[0]
    assert advantages[:2].tolist() == [0, 0]
    assert advantages[2] == -advantages[3] != 0
    alone = rollout([1.0, np.nan, 3.0, 5.0], ["a cat", "a cat", "a dog", "an ant"])
    alone.drop_non_finite()
    with pytest.raises(ValueError, match="2 prompts have one, such as 'a dog'"):
        estimator(alone)


def test_cut_episodes_are_told_from_dropped_ones():
    cut = rollout([1.0, np.nan, 3.0], ["a cat"] * 3, last_dones=False)
    cut.drop_non_finite()
    assert cut.complete_segments().tolist() == [False, False]
    whole = rollout([1.0, np.nan, 3.0], ["a cat"] * 3)
    whole.drop_non_finite()
    assert whole.complete_segments().tolist() == [True, True]


@pytest.mark.parametrize("lost", [5, 30, 71])
def test_updates_keep_their_number_and_have_no_small_remainder(lost):
    """72 samples, five steps of each, 4 updates of 90."""
    returns = np.arange(72.0)
    returns[:lost] = np.nan
    model = PPO("MlpPolicy", "CartPole-v1", batch_size=90, non_finite_rewards="drop", device="cpu")
    model.rollout_buffer = rollout(returns, ["a cat"] * 72, steps=5)
    model.rollout_buffer.drop_non_finite()
    batches = model._batches(model.select_steps())
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == 4
    assert sum(sizes) == (72 - lost) * 5
    assert max(sizes) - min(sizes) <= 1
    assert set(np.concatenate(batches) % 72) == set(range(lost, 72))


@pytest.mark.parametrize("deferred", [False, True])
def test_what_is_logged_is_of_the_others(micro_pipeline_folder, deferred):
    model = algorithm(PPO, micro_pipeline_folder, deferred=deferred, batch_size=12)
    metrics = logged(collected(model))
    returns = model.rollout_buffer.segment_returns()
    assert len(returns) == len(KEPT)
    assert metrics["rollout/dropped_samples"] == len(LOST)
    assert metrics["rollout/episodes"] == len(KEPT)
    assert metrics["rollout/reward_mean"] == pytest.approx(returns.mean())
    assert metrics["reward/doubled"] == pytest.approx(2 * returns.mean(), rel=1e-5)
    assert "reward/non_finite" not in metrics
    assert [episode["r"] for episode in model.ep_info_buffer] == pytest.approx(returns.tolist())
    model.env.vector_env.reward = brightness
    assert logged(collected(model))["rollout/dropped_samples"] == 0


def test_rollout_of_which_nothing_is_left_is_an_error(micro_pipeline_folder):
    with pytest.raises(ValueError, match="all 6 rewards of the rollout are NaN or infinite: no sample is left"):
        collected(algorithm(PPO, micro_pipeline_folder, lost=list(range(ENVS)), batch_size=12))


@pytest.mark.parametrize("deferred", [False, True])
def test_without_the_option_they_are_an_error_though_the_environment_keeps_them(micro_pipeline_folder, deferred):
    with pytest.raises(ValueError, match="rewards must be finite; got"):
        collected(algorithm(PPO, micro_pipeline_folder, deferred=deferred, batch_size=12, non_finite_rewards="raise"))


def test_unknown_option_is_refused():
    with pytest.raises(ValueError, match="non_finite_rewards must be one of raise, drop; got 'keep'"):
        PPO("MlpPolicy", "CartPole-v1", non_finite_rewards="keep")
