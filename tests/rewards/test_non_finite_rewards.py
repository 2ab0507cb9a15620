"""`non_finite_rewards` of the environment: such a score is an error, or a reward with a flag."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from ddpo_env import DenoisingVectorEnv
from rewards.sums.composite import Composite

STEPS = 2
SCORES = np.array([0.5, np.nan, np.inf])


def partly(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
    return SCORES[: len(images)], {"row": list(range(len(images)))}


def finished(env: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Rewards and last infos of one round of episodes."""
    env.reset(seed=0)
    for _ in range(STEPS):
        _, rewards, terminations, _, infos = env.step(np.zeros(env.action_space.shape, np.float32))
    assert terminations.all()
    return rewards, infos.get("final_info", infos)


def make(model: Any, mode: AutoresetMode = AutoresetMode.SAME_STEP, **arguments: Any) -> DenoisingVectorEnv:
    settings = {"reward": partly, "num_inference_steps": STEPS, "device": "cpu", "autoreset_mode": mode}
    return DenoisingVectorEnv(3, model=model, **settings | arguments)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_kept_scores_are_rewards_and_are_flagged_in_the_info(micro_pipeline_folder: Any, mode: AutoresetMode) -> None:
    rewards, infos = finished(make(micro_pipeline_folder, mode, non_finite_rewards="keep"))
    np.testing.assert_array_equal(rewards, SCORES)
    assert infos["reward_details"]["non_finite"].tolist() == [False, True, True]
    assert infos["reward_details"]["row"].tolist() == [0, 1, 2]


def test_kept_scores_of_deferred_rewards(micro_pipeline_folder: Any) -> None:
    rewards, infos = finished(make(micro_pipeline_folder, non_finite_rewards="keep", deferred_rewards=True))
    assert rewards.tolist() == [0, 0, 0]
    np.testing.assert_array_equal([one.result() for one in infos["deferred_reward"]], SCORES)
    assert [one.details()["non_finite"] for one in infos["deferred_reward"]] == [False, True, True]


@pytest.mark.parametrize("deferred", [False, True])
def test_non_finite_scores_are_an_error_by_default(micro_pipeline_folder: Any, deferred: bool) -> None:
    env = make(micro_pipeline_folder, deferred_rewards=deferred)
    with pytest.raises(ValueError, match="reward partly must be finite; got nan for prompt"):
        finished(env)[1]["deferred_reward"][0].result()


def test_gym_make_takes_the_option(micro_pipeline_folder: Any) -> None:
    arguments = {"num_inference_steps": 1, "model": micro_pipeline_folder, "non_finite_rewards": "keep"}
    env = gym.make("DDPO-SD-v0", reward=lambda *_: [np.nan], disable_env_checker=True, **arguments)
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(np.zeros((4, 8, 8), np.float32))
    assert terminated
    assert np.isnan(reward)
    assert info["reward_details"] == {"non_finite": True}


def test_other_values_of_the_option_are_refused(micro_pipeline_folder: Any) -> None:
    with pytest.raises(ValueError, match="non_finite_rewards must be one of raise, keep; got 'drop'"):
        make(micro_pipeline_folder, non_finite_rewards="drop")


def test_weighted_sum_learns_nothing_from_an_image_that_one_term_cannot_score() -> None:
    """Its statistics and the scores of the other images are those of a batch without this image."""
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    prompts = ["a cat", "an ant", "a dog", "a fox"]

    def sometimes_nan(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [
            np.nan if prompt == "an ant" else float(len(prompt)) + image.mean()
            for image, prompt in zip(images, prompts, strict=True)
        ]

    with_it, without = (
        Composite("jpeg_compressibility:1,tiny_preference:2"),
        Composite("jpeg_compressibility:1,tiny_preference:2"),
    )
    for reward in (with_it, without):
        reward.rewards["tiny_preference"] = sometimes_nan
    others = [0, 2, 3]
    for _ in range(2):
        scores, _ = with_it(images, prompts, [{}] * 4)
        expected, _ = without(images[others], [prompts[row] for row in others], [{}] * 3)
        assert np.isnan(scores[1])
        np.testing.assert_array_equal(scores[others], expected)
    assert with_it.state_dict() == without.state_dict()
