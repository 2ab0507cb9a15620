"""Rewards of a user's own: what they may do to their arguments, to the process and to the search path."""

import os
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium.wrappers.vector import TransformReward
from helpers.images import random_images
from helpers.micro_agents import brightness
from stable_baselines3.common.vec_env import VecNormalize

from agents import PPO, DiffusionPolicy, VectorEnvAdapter
from rewards import evaluate_reward, is_stateful, load_reward
from rewards.composite import Composite, Term


def blackens(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    images[:] = 0
    prompts.clear()
    for one in metadata:
        one["answers"].pop()
    return [0.0] * len(images)


def test_reward_may_write_into_its_arguments() -> None:
    images, metadata = random_images(2), [{"answers": ["two"]}, {"answers": ["three"]}]
    before = images.copy()
    evaluate_reward(blackens, images, ["a", "b"], metadata)
    assert np.array_equal(images, before)
    assert metadata == [{"answers": ["two"]}, {"answers": ["three"]}]


def test_terms_of_a_sum_get_arguments_of_their_own() -> None:
    terms = [Term(f"{__name__}:blackens", 1.0, raw=True), Term("helpers.micro_agents:brightness", 1.0, raw=True)]
    images, metadata = random_images(2), [{"answers": ["two"]}, {"answers": ["three"]}]
    scores, _ = evaluate_reward(Composite(terms), images, ["a", "b"], metadata)
    assert scores.tolist() == brightness(images, [], []).tolist()


def test_working_directory_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def leaves(images: Any, prompts: Any, metadata: Any) -> list[float]:
        os.chdir("/")
        raise RuntimeError("no such repository")

    with pytest.raises(RuntimeError, match="no such repository"):
        evaluate_reward(leaves, random_images(1), ["a"], [{}])
    assert Path.cwd() == tmp_path


def test_current_folder_does_not_stay_on_the_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
    (tmp_path / "sibling_of_reward.py").write_text("VALUE = 3.0\n")
    (tmp_path / "not_installed_package.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "my_own_reward.py").write_text(
        "from sibling_of_reward import VALUE\ndef score(images, prompts, metadata): return [VALUE] * len(images)\n"
    )
    reward = load_reward("my_own_reward:score")
    assert evaluate_reward(reward, random_images(1), ["a"], [{}])[0].tolist() == [3.0]
    assert str(tmp_path) not in sys.path
    with pytest.raises(ModuleNotFoundError):
        __import__("not_installed_package")


class Head(torch.nn.Module):
    def forward(self, images: Any, prompts: Any, metadata: Any) -> torch.Tensor:
        return torch.zeros(len(images))


class Counting(Head):
    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"seen": 3}


def test_module_is_stateful_only_if_it_says_so() -> None:
    assert not is_stateful(Head())
    assert is_stateful(Counting())


def test_score_that_float32_does_not_hold_is_not_finite() -> None:
    with pytest.raises(ValueError, match=r"reward <lambda> must be finite in float32, at most 3.4e\+38; got 1e\+39"):
        evaluate_reward(lambda images, prompts, metadata: [1e39], random_images(1), ["a"], [{}])
    scores, details = evaluate_reward(
        lambda images, prompts, metadata: [1e38], random_images(1), ["a"], [{}], non_finite="keep"
    )
    assert (scores.tolist(), details["non_finite"]) == ([1e38], [False])


def batch(folder: Path, deferred: bool) -> Any:
    return gym.make_vec(
        "ddpo_env:DDPO-SD-v0",
        num_envs=2,
        model=str(folder),
        num_inference_steps=2,
        prompts=["a cat"],
        reward=brightness,
        autoreset_mode="SameStep",
        deferred_rewards=deferred,
    )


def final_rewards(algorithm: Any, env: Any, **arguments: Any) -> np.ndarray:
    settings = {"n_steps": 2, "batch_size": 4, "gamma": 1.0, "policy_kwargs": {"guidance_scale": 1.0}, "seed": 0}
    model = algorithm(DiffusionPolicy, env, **settings | arguments)
    model.learn(4)
    return np.asarray(model.rollout_buffer.rewards[-1])


@pytest.mark.parametrize("algorithm", [PPO, stable_baselines3.PPO])
def test_deferred_rewards_reach_wrappers_and_stock_algorithms(micro_pipeline_folder: Path, algorithm: Any) -> None:
    for wrap in (lambda env: env, lambda env: VecNormalize(env, norm_obs=False, gamma=1.0)):
        at_once, deferred = (
            final_rewards(algorithm, wrap(VectorEnvAdapter(batch(micro_pipeline_folder, later))))
            for later in (False, True)
        )
        assert at_once.any()
        assert np.array_equal(at_once, deferred)


def test_deferred_rewards_are_refused_below_a_wrapper_of_the_environment(micro_pipeline_folder: Path) -> None:
    wrapped = TransformReward(batch(micro_pipeline_folder, True), lambda reward: 100 * reward)
    with pytest.raises(ValueError, match="deferred_rewards must be False with a wrapper such as TransformReward"):
        VectorEnvAdapter(wrapped)
