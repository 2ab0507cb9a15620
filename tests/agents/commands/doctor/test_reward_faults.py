"""Faults planted in rewards: the doctor tells them apart, and leaves the state of a healthy one alone."""

import numpy as np
import pytest
from helpers.micro_agents import brightness
from helpers.patients import Patient, examination_of, finding_of, findings_of
from helpers.stateful_rewards import Remembering

from agents.commands.doctor.checks import CHECKS
from agents.commands.doctor.examination import examine


def swapped(prompts, images, metadata):
    return [len(image) / 10 for image in images]  # these are the prompts


def swapped_and_failing(prompts, images, metadata):
    return images.mean((1, 2, 3))


def constant(images, prompts, metadata):
    return np.full(len(images), 0.5)


def missing(images, prompts, metadata):
    return np.where(np.arange(len(images)) % 2, brightness(images, prompts, metadata), np.nan)


def of_two_values(images, prompts, metadata):
    scores = brightness(images, prompts, metadata)
    return scores > np.median(scores)


def nan_for_grey(images, prompts, metadata):
    scores = images.std((1, 2, 3))
    return np.where(scores > 0, scores, np.nan)


@pytest.fixture
def random_reward():
    rng = np.random.default_rng(0)

    def reward(images, prompts, metadata):
        return rng.random(len(images))

    return reward


def test_swapped_arguments(tmp_path):
    finding = finding_of(Patient(), tmp_path, "reward inputs", reward=swapped)
    assert finding.level == "red"
    assert "do not depend on the images" in finding.meaning
    assert "images, prompts, metadata" in finding.advice


def test_swapped_arguments_of_a_reward_that_raises(tmp_path):
    finding = finding_of(Patient(), tmp_path, "reward", reward=swapped_and_failing)
    assert finding.level == "red"
    assert "AttributeError" in finding.meaning
    assert "swapped_and_failing" in finding.meaning


def test_constant_reward(tmp_path):
    findings = findings_of(Patient(), tmp_path, "reward", "timesteps", reward=constant)
    assert findings["reward"].level == "red"
    assert "All 4 scores are 0.5" in findings["reward"].meaning
    assert "advantages are 0" in findings["timesteps"].meaning


def test_reward_that_is_not_deterministic(tmp_path, random_reward):
    finding = finding_of(Patient(), tmp_path, "reward repeated", reward=random_reward)
    assert finding.level == "red"
    assert "noise is learned" in finding.advice


def test_reward_without_a_score_for_some_samples(tmp_path):
    finding = finding_of(Patient(), tmp_path, "reward", reward=missing)
    assert finding.level == "red"
    assert "2 of 4 scores are NaN" in finding.meaning
    assert "end with an error" in finding.meaning
    dropping = finding_of(Patient(), tmp_path, "reward", reward=missing, non_finite_rewards="drop")
    assert dropping.level == "amber"
    assert "drops" in dropping.meaning


def test_update_is_examined_although_some_samples_have_no_score(tmp_path):
    assert finding_of(Patient(), tmp_path, "update", reward=missing).numbers["optimizer_steps"] == 2


def test_reward_with_many_ties(tmp_path):
    settings = {"samples_per_iteration": 24, "sample_batch_size": 24}
    finding = finding_of(Patient(), tmp_path, "reward", reward=of_two_values, **settings)
    assert finding.level == "amber"
    assert "75% are ties" in finding.meaning


def test_reward_that_takes_most_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr("agents.commands.doctor.speed._seconds_per_sample", lambda _: (0.0, 3600.0))
    finding = finding_of(Patient(), tmp_path, "plan")
    assert finding.level == "amber"
    assert "reward takes most" in finding.advice


def test_reward_without_a_score_for_a_grey_image(tmp_path):
    finding = finding_of(Patient(), tmp_path, "reward inputs", reward=nan_for_grey)
    assert finding.level == "amber"
    assert "score of grey is NaN" in finding.meaning


def test_model_is_examined_although_the_reward_cannot_be_loaded(tmp_path):
    class Unavailable:
        def load(self):
            raise OSError("its weights are not here")

        def __call__(self, images, prompts, metadata):
            return brightness(images, prompts, metadata)

    findings = findings_of(Patient(), tmp_path, "parity", "reward", "gradient", "LoRA", reward=Unavailable())
    assert findings["parity"].level == findings["LoRA"].level == "green"
    assert findings["reward"].level == "red"
    assert "its weights are not here" in findings["reward"].meaning
    assert "Not examined: the reward failed" in findings["gradient"].meaning


def test_state_of_a_reward_is_left_alone(tmp_path):
    reward = Remembering()
    examination = examination_of(Patient(), tmp_path, reward)
    checks = ("stochastic sampler", "reward", "reward repeated", "reward inputs")
    findings = examine(examination, {name: CHECKS[name] for name in checks})
    assert {finding.level for finding in findings} == {"green"}
    assert reward.state_dict() == {"seen": 0, "total": 0.0}
