"""What docs/rewards.md promises: its example runs, and every built-in reward has its line."""

import re

import numpy as np
import torch
from helpers.paths import ROOT

from rewards import (
    BUILTIN_REWARDS,
    StatefulReward,
    check_differentiable,
    combine_measurements,
    evaluate_reward,
    measure_reward,
    score_with_gradient,
)

PAGE = (ROOT / "docs" / "rewards.md").read_text("utf-8")


def test_example_of_a_users_reward_is_one():
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def warmth" in block)
    assert len(code.splitlines()) <= 10
    names: dict = {}
    exec(code, names)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[0, ..., 0] = 200
    scores, details = evaluate_reward(names["warmth"], images, ["a cat", "a dog"], [{}] * 2)
    assert scores.tolist() == details["red"] == [200, 0]


def test_example_of_a_differentiable_reward_scores_alike_both_ways():
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class Redness" in block)
    names: dict = {}
    exec(code, names)
    reward = check_differentiable(names["Redness"]())
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    samples = (torch.as_tensor(images).movedim(-1, 1) / 255).requires_grad_()
    scores = score_with_gradient(reward, samples, ["a cat"] * 3)
    np.testing.assert_allclose(scores.detach(), evaluate_reward(reward, images, ["a cat"] * 3, [{}] * 3)[0], rtol=1e-5)


def test_every_built_in_reward_is_documented_and_measured_or_said_not_to_be():
    for name in BUILTIN_REWARDS:
        assert f"| `{name}` |" in PAGE
    measured = PAGE.partition("## Throughput")[2]
    for name in BUILTIN_REWARDS.keys() - {"jpeg_incompressibility"}:
        assert f"`{name}`" in measured


def test_example_of_a_reward_in_two_stages_is_one():
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class Novelty" in block)
    space = {"np": np}
    exec(code, space)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    whole, apart = space["Novelty"](), space["Novelty"]()
    assert isinstance(whole, StatefulReward)
    for _ in range(2):
        expected, _ = evaluate_reward(whole, images, ["a cat"] * 4, [{}] * 4)
        processes = [measure_reward(apart, images[rows], ["a cat"] * 2, [{}] * 2) for rows in (slice(2), slice(2, 4))]
        measurements = [one for measured, _ in processes for one in measured]
        scores, _ = combine_measurements(apart, measurements, {}, ["a cat"] * 4, "raise")
        np.testing.assert_array_equal(scores, expected)
    colours = images.mean(axis=(1, 2))
    np.testing.assert_allclose(scores, np.linalg.norm(colours - colours.mean(axis=0), axis=1))
