"""Rewards of two stages: several callers measure some rows each, and the combined scores are those of one caller."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from helpers.images import PROMPTS, random_images
from helpers.stateful_rewards import Shareable

from rewards import (
    StatefulReward,
    TwoStageReward,
    check_shareable,
    combine_measurements,
    evaluate_reward,
    images_only,
    load_reward,
    measure_reward,
)
from rewards.sums.composite import Composite

HERE = __name__
STATEFUL = "helpers.stateful_rewards"
SUM = f"{HERE}:brightness:1,{HERE}:contrast:0.5"
NESTED = f"{HERE}:Pair:2,{HERE}:contrast:-0.5:raw,{STATEFUL}:Shareable:1"
SPECS = {
    "standardised": SUM,
    "raw": f"{HERE}:brightness:100:raw,{HERE}:contrast:1",
    "without some scores": f"{HERE}:brightness:1,{HERE}:sometimes_nan:1",
    "nested": NESTED,
    "own two stages": f"{STATEFUL}:Shareable",
}


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) / 255


def contrast(images, prompts, metadata):
    return images.std((1, 2, 3)), {"darkest": images.min((1, 2, 3)).tolist()}


def sometimes_nan(images, prompts, metadata):
    return [math.nan if prompt == "an ant" else float(len(prompt)) for prompt in prompts]


class Pair(Composite):
    """A weighted sum that is a term of another one."""

    def __init__(self):
        super().__init__(SUM)


def measured_in_pieces(reward, images, prompts, edges, non_finite="keep"):
    """Scores and details of a batch of which several callers measure some rows each."""
    measurements, details = [], {}
    for start, stop in pairwise(edges):
        piece = images[start:stop], prompts[start:stop], [{}] * (stop - start)
        some, known = measure_reward(reward, *piece)
        measurements += some
        for name, values in known.items():
            details.setdefault(name, []).extend(values)
    return combine_measurements(reward, measurements, details, prompts, non_finite)


@pytest.mark.parametrize("edges", [(0, 2, 4), (0, 1, 1, 4), (0, 4)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_measured_in_pieces_and_combined_equals_scored_at_once(spec, edges):
    whole, pieces = load_reward(spec), load_reward(spec)
    for seed in range(3):
        images = random_images(4, seed)
        expected, known = evaluate_reward(whole, images, PROMPTS, [{}] * 4, non_finite="keep")
        scores, details = measured_in_pieces(pieces, images, PROMPTS, edges)
        np.testing.assert_array_equal(scores, expected)
        assert json.dumps(details, sort_keys=True) == json.dumps(known, sort_keys=True)  # NaN equals NaN here
        assert pieces.state_dict() == whole.state_dict()
        assert len(set(scores[np.isfinite(scores)])) > 1


def test_measuring_does_not_change_the_statistics():
    reward = load_reward(NESTED)
    evaluate_reward(reward, random_images(4), PROMPTS, [{}] * 4)
    before = json.dumps(reward.state_dict())
    measurements, details = measure_reward(reward, random_images(4, 1), PROMPTS, [{}] * 4)
    assert json.dumps(reward.state_dict()) == before
    assert len(measurements) == 4
    assert f"{HERE}:Pair/{HERE}:contrast/darkest" in details
    assert f"{HERE}:Pair" not in details, "the score of this term is not known yet"


def test_statistics_of_a_nested_sum_are_frozen_too():
    reward = load_reward(NESTED)

    def state_of_pair(seed):
        evaluate_reward(reward, random_images(4, seed), PROMPTS, [{}] * 4)
        return json.dumps(reward.state_dict()["rewards"][f"{HERE}:Pair"])

    before = state_of_pair(0)
    with reward.frozen():
        assert state_of_pair(1) == before
    assert state_of_pair(1) != before


def test_nested_sum_is_standardised_like_any_term():
    images = random_images(4)
    pair = Pair()(images, PROMPTS, [{}] * 4)[0]
    above = images.mean((1, 2, 3)) / 255
    above -= above.mean()
    expected = 2 * (pair - pair.mean()) / pair.std() - 0.5 * images.std((1, 2, 3)) + above / above.std()
    scores, details = load_reward(NESTED)(images, PROMPTS, [{}] * 4)
    np.testing.assert_allclose(scores, expected)
    assert details[f"{HERE}:Pair"] == pair.tolist()
    assert details[f"{STATEFUL}:Shareable/seen"] == [4] * 4


def test_non_finite_score_is_the_same_error_as_with_one_caller():
    spec = SPECS["without some scores"]
    with pytest.raises(ValueError, match="got nan for prompt 'an ant'.*:sometimes_nan is nan") as expected:
        evaluate_reward(load_reward(spec), random_images(4), PROMPTS, [{}] * 4)
    with pytest.raises(ValueError, match="composite must be finite") as caught:
        measured_in_pieces(load_reward(spec), random_images(4), PROMPTS, (0, 2, 4), non_finite="raise")
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize(("measured", "count"), [([1.0, 2.0], "2"), (None, "None"), ("four", "None")])
def test_wrong_number_of_measurements_is_an_error(monkeypatch, measured, count):
    monkeypatch.setattr(Shareable, "measure", lambda self, images, prompts, metadata: measured)
    message = f"reward Shareable: measure must return 4 measurements, one per sample; got {count}"
    with pytest.raises(ValueError, match=message):
        measure_reward(Shareable(), random_images(4), PROMPTS, [{}] * 4)


def test_errors_of_both_stages_name_the_reward(monkeypatch):
    def broken(self, *_):
        raise KeyError("no idea")

    monkeypatch.setattr(Shareable, "combine", lambda self, measurements: [1.0])
    message = r"reward Shareable must return shape \(4,\), one score per sample; got \(1,\)"
    with pytest.raises(ValueError, match=message):
        measured_in_pieces(Shareable(), random_images(4), PROMPTS, (0, 4))
    monkeypatch.setattr(Shareable, "combine", broken)
    with pytest.raises(KeyError, match="no idea") as caught:
        measured_in_pieces(Shareable(), random_images(2), PROMPTS[:2], (0, 2))
    assert caught.value.__notes__ == ["raised by the reward Shareable, combining 2 measurements"]
    monkeypatch.setattr(Shareable, "measure", broken)
    with pytest.raises(KeyError, match="no idea") as caught:
        measure_reward(Shareable(), random_images(2), PROMPTS[:2], [{}] * 2)
    assert caught.value.__notes__ == ["raised by the reward Shareable, measuring 2 samples"]


def test_samples_are_checked_before_they_are_measured():
    reward = images_only(type("Marked", (Shareable,), {}))()
    with pytest.raises(ValueError, match="reward Marked scores images, uint8"):
        measure_reward(reward, np.zeros((2, 2)), PROMPTS[:2], [{}] * 2)


@pytest.mark.parametrize("spec", [*SPECS.values(), f"{HERE}:contrast", "jpeg_compressibility"])
def test_rewards_that_processes_can_share(spec):
    reward = load_reward(spec)
    check_shareable(reward)
    assert isinstance(reward, TwoStageReward) or not isinstance(reward, StatefulReward)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (f"{STATEFUL}:Remembering", "Remembering"),
        (f"{HERE}:brightness:1,{STATEFUL}:Remembering:1:raw", f"{STATEFUL}:Remembering"),
    ],
)
def test_state_that_processes_cannot_share_is_refused(spec, name):
    with pytest.raises(ValueError, match=rf"^reward {name} keeps a state.*it must have measure\(.*combine\("):
        check_shareable(load_reward(spec))
