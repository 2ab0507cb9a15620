"""Rewards of a user's own: what they may do to their arguments, to the process and to the search path."""

import os
import sys
import threading
from collections.abc import Iterator
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
from rewards import combine_measurements, evaluate_reward, is_stateful, load_reward, measure_reward
from rewards.sums.composite import Composite
from rewards.sums.terms import Term


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


def test_deleted_working_directory_ends_no_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert evaluate_reward(lambda images, prompts, metadata: [1.0], random_images(1), ["a"], [{}])[0].tolist() == [1.0]


def test_exit_inside_a_reward_is_an_error_that_names_it() -> None:
    def leaves(images: Any, prompts: Any, metadata: Any) -> None:
        sys.exit(0)

    with pytest.raises(RuntimeError, match=r"sys.exit\(0\) was raised by the reward leaves"):
        evaluate_reward(leaves, random_images(1), ["a"], [{}])


MODULES = {
    "sibling_of_reward": "VALUE = 3.0\n",
    "lazy_sibling_of_reward": "import sibling_of_reward\nVALUE = 4.0\n",
    "not_installed_package": "raise RuntimeError('imported')\n",
    "leaves_at_import": "import os, sys\nos.chdir('/')\nsys.exit(0)\n",
    "my_own_reward": (
        "from sibling_of_reward import VALUE\n"
        "def score(images, prompts, metadata): return [VALUE] * len(images)\n"
        "def lazy(images, prompts, metadata):\n"
        "    import lazy_sibling_of_reward\n"
        "    return [lazy_sibling_of_reward.VALUE] * len(images)\n"
        "def library(images, prompts, metadata):\n"
        "    import installed_library\n"
        "    return [installed_library.value()] * len(images)\n"
    ),
    "needs_a_library": (
        "import installed_library\n"
        "FOUND = installed_library.value()\n"
        "def score(images, prompts, metadata): return [FOUND] * len(images)\n"
    ),
}


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules in it, and beside it a library on the search path with an optional part."""
    folder, installed = tmp_path / "user", tmp_path / "installed"
    folder.mkdir()
    installed.mkdir()
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    (installed / "installed_library.py").write_text(
        "def value():\n"
        "    try:\n"
        "        import not_installed_package\n"
        "    except ModuleNotFoundError:\n"
        "        return 5.0\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*(one for one in sys.path if one not in ("", str(folder))), str(installed)])
    yield folder
    for name in (*MODULES, "installed_library"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("my_own_reward:score", 3.0),
        ("my_own_reward:lazy", 4.0),
        ("my_own_reward:library", 5.0),
        ("needs_a_library:score", 5.0),
    ],
)
def test_only_the_users_modules_import_from_the_current_folder(user_folder: Path, spec: str, expected: float) -> None:
    reward = load_reward(spec)
    assert evaluate_reward(reward, random_images(1), ["a"], [{}])[0].tolist() == [expected]
    assert str(user_folder) not in sys.path
    with pytest.raises(ModuleNotFoundError):
        __import__("not_installed_package")


def test_exit_at_import_is_an_error_that_names_the_reward(user_folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"sys.exit\(0\) was raised by the import of the reward 'leaves_at_im"):
        load_reward("leaves_at_import:f")
    assert Path.cwd() == user_folder


class Reused:
    """Answers from a buffer that every call writes into."""

    def __init__(self) -> None:
        self.buffer = np.zeros((1, 2))

    def measure(self, images: Any, prompts: Any, metadata: Any) -> Any:
        self.buffer += 1
        return self.buffer

    def combine(self, measurements: Any) -> Any:
        measurements.clear()
        return [0.0]

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> Any:
        self.buffer += 1
        return self.buffer[:, 0], {"both": self.buffer}


def test_answers_are_copies_of_what_a_reward_keeps() -> None:
    reward, batch = Reused(), (random_images(1), ["a"], [{}])
    scores, details = evaluate_reward(reward, *batch)
    measurements, _ = measure_reward(reward, *batch)
    evaluate_reward(reward, *batch)
    assert (scores.tolist(), details["both"][0].tolist(), measurements[0].tolist()) == ([1.0], [1.0, 1.0], [2.0, 2.0])
    combine_measurements(reward, measurements, {}, ["a"], "raise")
    assert len(measurements) == 1


def test_metadata_that_cannot_be_copied_is_named() -> None:
    with pytest.raises(ValueError, match=r"metadata must be dictionaries that copy.deepcopy can copy"):
        evaluate_reward(brightness, random_images(1), ["a"], [{"lock": threading.Lock()}])


def test_masked_score_is_a_missing_one() -> None:
    scores, details = evaluate_reward(
        lambda images, prompts, metadata: np.ma.array([1.0, 2.0], mask=[True, False]),
        random_images(2),
        ["a", "b"],
        [{}, {}],
        non_finite="keep",
    )
    assert details["non_finite"] == [True, False]
    assert scores[1] == 2


class Head(torch.nn.Module):
    def forward(self, images: Any, prompts: Any, metadata: Any) -> torch.Tensor:
        return torch.zeros(len(images))


class Counting(Head):
    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"seen": 3}


def test_module_is_stateful_only_if_it_says_so() -> None:
    assert not is_stateful(Head())
    assert not is_stateful(torch.compile(Head()))
    assert is_stateful(Counting())


class OneArgument(torch.nn.Module):
    def forward(self, images: Any) -> Any:
        return images


async def later(images: Any, prompts: Any, metadata: Any) -> list[float]:
    return [0.0]


async def later_one_by_one(images: Any, prompts: Any, metadata: Any) -> Any:
    yield 0.0


@pytest.mark.parametrize("reward", [OneArgument(), OneArgument, later, later_one_by_one])
def test_what_cannot_be_called_as_a_reward_is_refused_at_once(reward: Any) -> None:
    with pytest.raises(TypeError, match=r"reward .* must be (callable as \(images, prompts, meta|a plain function)"):
        load_reward(reward)


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
