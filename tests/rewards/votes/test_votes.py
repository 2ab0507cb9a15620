"""The reward: votes become scores, held-out samples cost none, and nobody is asked twice."""

import json
import math
import threading
from concurrent.futures import CancelledError
from itertools import combinations

import numpy as np
import pytest

from rewards import asking_people, check_shareable, evaluate_reward, load_reward
from rewards.formulas.preference import tiny_preference
from rewards.votes.ballot import Candidate, Comparison, VoteFile, image_hash
from rewards.votes.voters import SimulatedPerson

GROUPS = ["a cat"] * 4 + ["a dog"] * 4


def discs(batch=8, seed=0):
    """Discs of random colour and size on grey."""
    generator = np.random.default_rng(seed)
    images = np.full((batch, 32, 32, 3), 128, np.uint8)
    y, x = np.mgrid[:32, :32] - 15.5
    for image in images:
        image[x**2 + y**2 < generator.uniform(3, 14) ** 2] = generator.integers(0, 256, 3)
    return images


class Clicking:
    """A voter that prefers the brighter image, and notes what it was asked; it may fall asleep after some votes."""

    def __init__(self, awake=10**9):
        self.asked, self.patience, self.awake = [], [], awake

    def open(self):
        pass

    def ask(self, comparisons, cast, patience):
        self.patience.append(patience)
        self.cast = cast
        for comparison in comparisons[: self.awake - len(self.asked)]:
            self.asked.append(comparison)
            self.vote(comparison)

    def vote(self, comparison):
        left, right = comparison.left.image.mean(), comparison.right.image.mean()
        self.cast(comparison, "left" if left > right else "right")

    def close(self):
        pass


def votes(voter=None, **options):
    reward = load_reward("votes", model="tiny", device="cpu", **options)
    if voter is not None:
        reward._voters = voter
    return reward


def score(reward, images, prompts=GROUPS):
    return evaluate_reward(reward, images, prompts, [{}] * len(images))


def test_with_all_votes_the_scores_of_a_group_have_the_voters_order():
    images = discs()
    scores, details = score(votes(Clicking(), votes_per_batch=12), images)
    brightness = images.mean(axis=(1, 2, 3))
    for group in (slice(4), slice(4, 8)):
        assert np.argsort(scores[group]).tolist() == np.argsort(brightness[group]).tolist()
    assert details["votes"] == [3] * 8
    np.testing.assert_allclose([scores[:4].sum(), scores[4:].sum()], 0, atol=1e-9)  # no prompt against another one


def test_only_images_of_the_same_prompt_are_compared():
    voter = Clicking()
    score(votes(voter, votes_per_batch=100), discs(), ["a cat", "a dog"] * 4)
    assert len(voter.asked) == 12
    assert all(one.left.row % 2 == one.right.row % 2 for one in voter.asked)
    with pytest.raises(ValueError, match="no prompt has two different images .* samples_per_prompt must be at least 2"):
        score(votes(voter), discs(2), ["a cat", "a dog"])
    with pytest.raises(ValueError, match="no prompt has two different images"):
        score(votes(voter), np.stack([discs(1)[0]] * 2), ["a cat", "a cat"])


def test_held_out_samples_are_scored_by_the_judge_and_cost_no_votes():
    voter = Clicking()
    reward = votes(voter)
    with reward.frozen():
        assert score(reward, discs(8, seed=1))[0].tolist() == [0] * 8  # nothing is known yet
    score(reward, discs())
    asked, state = len(voter.asked), reward.state_dict()
    with reward.frozen():
        scores, _ = score(reward, discs(8, seed=1))
    assert np.std(scores) > 0
    assert len(voter.asked) == asked
    np.testing.assert_array_equal(reward.state_dict()["differences"], state["differences"])


def test_repeated_run_asks_for_nothing_that_the_file_knows(tmp_path):
    images, file = discs(), tmp_path / "votes.jsonl"
    expected, _ = score(votes(Clicking(), votes_per_batch=5, file=file), images)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 5
    assert set(lines[0]) == {"left", "right", "prompt", "question", "winner", "voter", "when"}
    again = Clicking()
    scores, _ = score(votes(again, votes_per_batch=5, file=file), images)
    assert not again.asked
    np.testing.assert_array_equal(scores, expected)
    other = Clicking()
    score(votes(other, votes_per_batch=5, file=file, question="Which one is funnier?"), images)
    assert len(other.asked) == 5  # a vote answers one question only


def test_patience_scores_with_what_there_is_and_late_votes_count_later():
    voter = Clicking()
    reward = votes(voter, votes_per_batch=4, patience=0.5)
    score(reward, discs())
    voter.awake = len(voter.asked) + 1
    _, details = score(reward, discs(8, seed=1))
    assert voter.patience == [None, 0.5]  # the first batch has no judge that could go on
    assert sum(details["votes"]) == 2
    voter.vote(voter.asked[-1])  # anything may still be cast
    score(reward, discs(8, seed=2))
    assert len(reward.judge.differences) == 4 + 1 + 1


def test_unfinished_last_line_is_dropped_and_another_file_is_left_alone(tmp_path):
    file = tmp_path / "votes.jsonl"
    score(votes(Clicking(), votes_per_batch=2, file=file), discs())
    whole = file.read_text()
    file.write_text(whole + whole[:60])
    assert len(VoteFile(file, "Which image is better?", "person")) == 2
    assert file.read_text() == whole
    other = tmp_path / "notes.txt"
    for text in ("dear diary", "dear diary\n", whole + '{"left": 1}\n', whole + "[" * 100_000 + "\n"):
        other.write_text(text)
        with pytest.raises(ValueError, match="must be a (file of votes|vote)"):
            votes(file=other)
        assert other.read_text() == text


def test_simulated_person_errs_as_often_as_the_noise_says():
    """Without noise the true preference wins; with normal errors of both images P(right) = Φ(difference / (σ√2))."""
    images = discs(24)
    preference, _ = tiny_preference(images, ["a cat"] * 24, [{}] * 24)
    shown = [Candidate(image, image_hash(image), np.zeros(1), row) for row, image in enumerate(images)]
    pairs = [Comparison("a cat", left, right) for left, right in combinations(shown, 2)]
    differences = np.array([preference[one.left.row] - preference[one.right.row] for one in pairs])
    expected = np.mean([0.5 * (1 + math.erf(abs(difference) / 2)) for difference in differences])
    for noise, rate, tolerance in ((0.0, 1.0, 0.0), (1.0, expected, 0.08)):
        sides = {}
        SimulatedPerson(noise).ask(pairs, sides.__setitem__, None)
        right = [(sides[one] == "left") == (difference > 0) for one, difference in zip(pairs, differences, strict=True)]
        assert np.mean(right) == pytest.approx(rate, abs=tolerance)
    assert 0.6 < expected < 0.95


def test_cancel_ends_a_wait_for_people():
    reward = votes(votes_per_batch=1)
    assert asking_people(reward) == [reward]
    threading.Timer(0.3, reward.cancel).start()
    with pytest.raises(CancelledError):
        score(reward, discs())
    with pytest.raises(CancelledError):
        score(reward, discs())


def test_wrong_use_is_refused_early():
    cases = {"votes_per_batch": 0, "patience": -1, "port": 70000, "simulated_noise": -0.1, "question": " "}
    for name, value in cases.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            votes(**{name: value})
    with pytest.raises(ValueError, match="or start one process"):
        check_shareable(votes())
