"""Weighted sums of rewards: parsing, running statistics against NumPy, details, state and bad scores."""

import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
from helpers.images import PROMPTS, random_images

from rewards import StatefulReward, evaluate_reward, load_reward
from rewards.sums.composite import Composite
from rewards.sums.terms import RunningStatistics, Term, parse_terms


def brightness(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3)), {"darkest": images.min(axis=(1, 2, 3))}


def length(images, prompts, metadata):
    return [len(prompt) for prompt in prompts]


def sometimes_nan(images, prompts, metadata):
    return [math.nan if prompt == "an ant" else float(len(prompt)) for prompt in prompts]


HERE = __name__


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("aesthetic:1,clip_score:0.5", [Term("aesthetic", 1.0), Term("clip_score", 0.5)]),
        (" aesthetic:-2 , clip_score:+.5:raw ", [Term("aesthetic", -2.0), Term("clip_score", 0.5, raw=True)]),
        ("my_rewards:score:1e-3,hps_v2:0", [Term("my_rewards:score", 0.001), Term("hps_v2", 0.0)]),
        ("jpeg_compressibility:1", [Term("jpeg_compressibility", 1.0)]),
    ],
)
def test_terms_are_read_from_text(spec, terms):
    assert parse_terms(spec) == tuple(terms)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip_score:1,", "must be name:weight or name:weight:raw .*; got ''"),
        ("clip_score,hps_v2:1", "got 'clip_score'"),
        ("clip_score:one", "got 'clip_score:one'"),
        ("clip_score:nan,hps_v2:1", "got 'clip_score:nan'"),
        ("clip_score:inf,hps_v2:1", "got 'clip_score:inf'"),
        (":1", "got ':1'"),
        ("clip_score:1:rwa,hps_v2:1", "got 'clip_score:1:rwa'"),
        ("clip_score:raw", "got 'clip_score:raw'"),
        ("clip_score:", "got 'clip_score:'"),
        ("clip_score:1,clip_score:2", "must name each term once; clip_score occurs more often"),
        ("jpeg_compressibility:0", "reward must have a term whose weight is not 0; got 'jpeg_compressibility:0'"),
        ("jpeg:1,hps_v2:1", "reward must be one of jpeg_compressibility, .*; got 'jpeg'"),
    ],
)
def test_wrong_terms_are_quoted(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_running_statistics_are_those_of_the_whole_history():
    generator = np.random.default_rng(0)
    batches = [generator.normal(1e6, 3, size) for size in (1, 4, 7, 0, 30)]
    statistics = RunningStatistics()
    assert statistics.std == 0
    for batch in batches:
        statistics = statistics.joined(batch)
    values = np.concatenate(batches)
    assert statistics.count == 42
    assert statistics.mean == pytest.approx(values.mean(), rel=1e-12)
    assert statistics.std == pytest.approx(values.std(), rel=1e-9)


def test_sum_of_standardised_and_raw_terms():
    reward = load_reward(f"{HERE}:brightness:2,{HERE}:length:-0.5:raw,jpeg_incompressibility:1")
    light, size = [], []
    for seed in range(3):
        images = random_images(4, seed)
        scores, details = evaluate_reward(reward, images, PROMPTS, [{}] * 4)
        light.append(images.mean(axis=(1, 2, 3)))
        size.append(load_reward("jpeg_incompressibility")(images, PROMPTS, [{}] * 4))
        standard = [
            (batches[-1] - np.concatenate(batches).mean()) / np.concatenate(batches).std() for batches in (light, size)
        ]
        expected = 2 * standard[0] - 0.5 * np.array([5, 5, 6, 5]) + standard[1]
        np.testing.assert_allclose(scores, expected, rtol=1e-9)
    assert details[f"{HERE}:length"] == [5, 5, 6, 5]
    np.testing.assert_allclose(details[f"{HERE}:brightness"], light[-1])
    np.testing.assert_allclose(details["jpeg_incompressibility"], size[-1])
    assert details[f"{HERE}:brightness/darkest"] == images.min(axis=(1, 2, 3)).tolist()


def test_term_that_never_varies_adds_nothing():
    reward = load_reward(f"{HERE}:length:1,jpeg_compressibility:0")
    scores, _ = evaluate_reward(reward, random_images(2), PROMPTS[:2], [{}] * 2)
    assert scores.tolist() == [0, 0]
    assert evaluate_reward(reward, random_images(0), [], [])[0].shape == (0,)


def test_frozen_statistics_do_not_move():
    reward = Composite("jpeg_incompressibility:1")
    with reward.frozen():
        first = reward(random_images(4), PROMPTS, [{}] * 4)[0]
        assert reward.statistics["jpeg_incompressibility"].count == 0
    np.testing.assert_allclose([first.mean(), first.std()], [0, 1], atol=1e-12)
    reward(random_images(4), PROMPTS, [{}] * 4)
    before = reward.state_dict()
    with reward.frozen():
        again = reward(random_images(4), PROMPTS, [{}] * 4)[0]
        one = reward(random_images(4)[1:2], PROMPTS[1:2], [{}])[0]
    assert reward.state_dict() == before
    assert one[0] == again[1], "with frozen statistics, a score does not depend on the batch"


def test_state_survives_json_and_continues_exactly():
    spec = f"jpeg_incompressibility:1,{HERE}:brightness:0.3,{HERE}:length:1:raw"
    whole, first = load_reward(spec), load_reward(spec)
    for seed in range(2):
        first(random_images(4, seed), PROMPTS, [{}] * 4)
        whole(random_images(4, seed), PROMPTS, [{}] * 4)
    assert isinstance(first, StatefulReward)
    resumed = load_reward(spec)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    np.testing.assert_array_equal(
        resumed(random_images(4, 9), PROMPTS, [{}] * 4)[0], whole(random_images(4, 9), PROMPTS, [{}] * 4)[0]
    )
    with pytest.raises(ValueError, match="state must have statistics of jpeg_compressibility; got jpeg_incompress"):
        load_reward("jpeg_compressibility:1").load_state_dict(first.state_dict())


def test_nan_of_a_term_is_an_error_that_names_the_term():
    reward = load_reward(f"jpeg_compressibility:1,{HERE}:sometimes_nan:1")
    message = rf"reward composite must be finite; got nan for prompt 'an ant' .*; {HERE}:sometimes_nan is nan"
    with pytest.raises(ValueError, match=message):
        evaluate_reward(reward, random_images(4), PROMPTS, [{}] * 4)


def test_kept_nan_does_not_enter_the_statistics():
    reward = load_reward(f"{HERE}:sometimes_nan:1:raw,jpeg_compressibility:0,{HERE}:length:0")
    scores, details = evaluate_reward(reward, random_images(4), PROMPTS, [{}] * 4, non_finite="keep")
    assert details["non_finite"] == [False, False, True, False]
    assert np.isnan(scores).tolist() == details["non_finite"]
    standardised = load_reward(f"{HERE}:sometimes_nan:1")
    evaluate_reward(standardised, random_images(4), PROMPTS, [{}] * 4, non_finite="keep")
    assert standardised.statistics[f"{HERE}:sometimes_nan"].count == 3


def test_options_reach_the_terms():
    reward = load_reward("clip_score:1,hps_v2:1", options={"clip_score": {"batch_size": 3}})
    assert reward.rewards["clip_score"].batch_size == 3
    with pytest.raises(ValueError, match="options must be of clip_score; got hps_v2"):
        load_reward("clip_score:1", options={"hps_v2": {}})
    reward.unload()


def test_state_contains_the_states_of_terms():
    inner = load_reward("jpeg_compressibility:1")
    outer = Composite("jpeg_incompressibility:1")
    outer.rewards["jpeg_incompressibility"] = inner
    outer(random_images(4), PROMPTS, [{}] * 4)
    state = outer.state_dict()
    assert state["rewards"]["jpeg_incompressibility"] == inner.state_dict()
    inner(random_images(4), PROMPTS, [{}] * 4)
    outer.load_state_dict(state)
    assert outer.state_dict() == state


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_kept_on_request_and_flagged(value):
    scores, details = evaluate_reward(
        lambda *_: [1.0, value, 2.0, 3.0], random_images(4), PROMPTS, [{}] * 4, non_finite="keep"
    )
    np.testing.assert_array_equal(scores, [1, value, 2, 3])
    assert details == {"non_finite": [False, True, False, False]}
    with pytest.raises(ValueError, match="non_finite must be raise or keep; got 'drop'"):
        evaluate_reward(lambda *_: [1.0], random_images(1), ["a"], [{}], non_finite="drop")


class WithAbilities:
    """Records the calls of its optional methods."""

    calls: tuple = ()

    def __call__(self, images, prompts, metadata):
        return [0.0] * len(images)

    def load(self):
        self.calls += ("load",)

    def unload(self):
        self.calls += ("unload",)

    def log_to(self, folder):
        self.calls += (folder,)

    @contextmanager
    def frozen(self):
        self.calls += ("frozen",)
        yield


def test_optional_methods_reach_the_terms_that_have_them(tmp_path):
    reward = load_reward(f"{HERE}:WithAbilities:1,jpeg_compressibility:1")
    reward.load()
    reward.log_to(tmp_path)
    with reward.frozen():
        pass
    reward.unload()
    expected = ("load", tmp_path / f"{HERE}-WithAbilities", "frozen", "unload")
    assert reward.rewards[f"{HERE}:WithAbilities"].calls == expected


@pytest.mark.parametrize("weight", [math.nan, 1e308, "1", True])
def test_weights_have_a_limit(weight):
    with pytest.raises(ValueError, match=r"weight must be a number in \[-1000000.0, 1000000.0\]; got"):
        Term("jpeg_compressibility", weight)


@pytest.mark.parametrize("terms", [[], 5, ["jpeg_compressibility"], [Term("jpeg_compressibility", 1)] * 2])
def test_terms_that_are_none_are_refused(terms):
    with pytest.raises(ValueError, match=r"terms must be a text such as|must name each term once"):
        Composite(terms)


@pytest.mark.parametrize("change", [{"count": -1}, {"mean": math.nan}, {"squares": -1.0}, {"mean": "0"}])
def test_state_that_is_no_statistics_is_refused(change):
    reward = Composite("jpeg_compressibility:1")
    state = reward.state_dict()
    state["statistics"]["jpeg_compressibility"] |= change
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        reward.load_state_dict(state)
