"""`deferred_rewards`: the same scores as at once, in the same order, from a thread that nobody waits for."""

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

import ddpo_env
from ddpo_env import DeferredReward, DenoisingVectorEnv
from rewards.sums.composite import Composite

STEPS = 2
TIMEOUT = 60.0
Answer = Callable[..., Any]


def brightness(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
    return images.mean((1, 2, 3)), {"red": images[..., 0].mean((1, 2)), "word": prompts}


class Gate:
    """A reward that answers only when it is let through, and remembers its calls."""

    def __init__(self, answer: Answer = brightness) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.answer = answer
        self.prompts: list[list[str]] = []
        self.threads: set[int] = set()

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        self.entered.set()
        assert self.open.wait(TIMEOUT)
        self.prompts.append(prompts)
        self.threads.add(threading.get_ident())
        return self.answer(images, prompts, metadata)


def broken(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
    raise KeyError("no judge")


@pytest.fixture
def make(micro_pipeline_folder: Path) -> Callable[..., DenoisingVectorEnv]:
    def make(reward: Any, mode: AutoresetMode = AutoresetMode.SAME_STEP, **arguments: Any) -> DenoisingVectorEnv:
        settings = {"prompts": ["a cat", "an ant", "a dog"], "num_inference_steps": STEPS, "device": "cpu"}
        settings = settings | {"deferred_rewards": True, "autoreset_mode": mode} | arguments
        return DenoisingVectorEnv(3, model=micro_pipeline_folder, reward=reward, **settings)

    return make


def actions(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((3, 4, 8, 8), np.float32)


def episodes(env: DenoisingVectorEnv, count: int = 2) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Rewards and last infos of some rounds of episodes."""
    ends: list[tuple[np.ndarray, dict[str, Any]]] = []
    env.reset(seed=0)
    step = 0
    while len(ends) < count:
        _, rewards, terminations, _, infos = env.step(actions(step))
        step += 1
        if terminations.any():
            ends.append((rewards, infos.get("final_info", infos)))
            if env.autoreset_mode is AutoresetMode.DISABLED:
                env.reset()
            elif env.autoreset_mode is AutoresetMode.NEXT_STEP and len(ends) < count:
                env.step(actions(0))
    return ends


@pytest.mark.parametrize("mode", AutoresetMode)
def test_scores_and_details_are_those_of_the_undeferred_environment(make: Any, mode: AutoresetMode) -> None:
    deferred, at_once = make(brightness, mode), make(brightness, mode, deferred_rewards=False)
    for (zeros, promised), (scores, given) in zip(episodes(deferred), episodes(at_once), strict=True):
        assert zeros.tolist() == [0, 0, 0]
        assert "reward_details" not in promised
        assert "deferred_reward" not in given
        assert np.array_equal(promised["image"], given["image"])
        assert promised["prompt"].tolist() == given["prompt"].tolist()
        for index, reward in enumerate(promised["deferred_reward"]):
            assert isinstance(reward, DeferredReward)
            assert reward.result() == scores[index]
            assert type(reward.result()) is float
            assert reward.done()
            assert reward.details() == {name: given["reward_details"][name][index] for name in ("red", "word")}


def test_step_does_not_wait_and_calls_keep_their_order_in_one_thread(make: Any) -> None:
    gate = Gate()
    env = make(gate)
    ends = episodes(env, 3)
    assert gate.entered.wait(TIMEOUT)
    assert not gate.prompts, "three rounds of episodes are over, and not one reward is known"
    promised = [reward for _, infos in ends for reward in infos["deferred_reward"]]
    assert not any(reward.done() for reward in promised)
    gate.open.set()
    env.wait_for_rewards()
    assert all(reward.done() for reward in promised)
    assert gate.prompts == [infos["prompt"].tolist() for _, infos in ends]
    assert gate.threads.isdisjoint({threading.get_ident()})
    assert len(gate.threads) == 1


@pytest.mark.parametrize("mode", AutoresetMode)
def test_exception_is_raised_by_the_next_step_once_with_its_traceback(make: Any, mode: AutoresetMode) -> None:
    env = make(broken, mode, num_inference_steps=1)
    env.reset(seed=0)
    env.step(actions(0))
    env.wait_for_rewards()
    before = env.step_index.copy()
    with pytest.raises(KeyError, match="no judge") as caught:
        env.step(actions(1))
    assert "broken" in [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert env.step_index.tolist() == before.tolist(), "the step can be repeated"
    with pytest.raises(ResetNeeded) if mode is AutoresetMode.DISABLED else nullcontext():
        env.step(actions(1))


def test_result_raises_the_exception_and_its_traceback_does_not_grow(make: Any) -> None:
    env = make(broken)
    ((_, infos),) = episodes(env, 1)
    frames = []
    for reward in [*infos["deferred_reward"]] * 2:
        for ask in (reward.result, reward.details):
            with pytest.raises(KeyError, match="no judge") as caught:
                ask()
            frames.append([frame.name for frame in traceback.extract_tb(caught.tb)])
    assert all(names[-1] == "broken" for names in frames)
    assert len({len(names) for names in frames}) == 1
    env.step(actions(0))  # it is known already


def test_each_failure_is_raised_once(make: Any) -> None:
    gate = Gate(broken)
    env = make(gate, num_inference_steps=1)
    episodes(env, 2)
    gate.open.set()
    env.wait_for_rewards()
    gate.answer = brightness
    for _ in range(2):
        with pytest.raises(KeyError):
            env.step(actions(0))
    env.step(actions(0))


@pytest.mark.parametrize("drain", ["reset", "close", "load_state_dict"])
def test_what_begins_anew_finishes_the_work_and_leaves_the_error_to_who_asks(make: Any, drain: str) -> None:
    gate = Gate(broken)
    env = make(gate)
    env.reset(seed=0)
    state = env.state_dict()
    ((_, infos),) = episodes(env, 1)
    threading.Timer(0.05, gate.open.set).start()
    getattr(env, drain)(*(state if drain == "load_state_dict" else ()))
    assert len(gate.prompts) == 1
    with pytest.raises(KeyError):
        infos["deferred_reward"][0].result()
    if drain != "close":
        env.step(actions(0))


def test_reset_of_some_keeps_the_failure_of_an_ended_episode_for_the_next_step(make: Any) -> None:
    """With staggered episodes, sub-environment 0 ends and begins anew alone; its reward has failed."""
    gate = Gate(broken)
    env = make(gate, AutoresetMode.DISABLED)
    env.reset(seed=0)
    env.step(actions(0))
    env.reset(options={"reset_mask": np.array([False, True, True])})
    assert env.step(actions(1))[2].tolist() == [True, False, False]
    env.reset(options={"reset_mask": np.array([True, False, False])})
    assert not gate.prompts, "it does not wait, just as a step that resets does not"
    gate.open.set()
    env.wait_for_rewards()
    with pytest.raises(KeyError, match="no judge"):
        env.step(actions(2))
    assert env.step(actions(2))[2].tolist() == [False, True, True]


def test_state_dict_waits_and_the_next_step_still_raises(make: Any) -> None:
    gate = Gate(broken)
    env = make(gate)
    ((_, infos),) = episodes(env, 1)
    threading.Timer(0.05, gate.open.set).start()
    env.state_dict()
    assert infos["deferred_reward"][0].done()
    with pytest.raises(KeyError):
        env.step(actions(0))


def test_close_with_a_pending_reward_ends_the_thread(make: Any) -> None:
    gate = Gate()
    env = make(gate)
    ((_, infos),) = episodes(env, 1)
    assert gate.entered.wait(TIMEOUT)
    threading.Timer(0.05, gate.open.set).start()
    env.close()
    env.close()
    assert infos["deferred_reward"][2].result() == infos["image"][2].mean()
    assert not gate.threads & {thread.ident for thread in threading.enumerate()}


def test_cancelled_rewards_are_never_computed(make: Any) -> None:
    gate = Gate()
    env = make(gate)
    ends = episodes(env, 3)
    assert gate.entered.wait(TIMEOUT)
    env.cancel_rewards()
    gate.open.set()
    env.reset()
    assert len(gate.prompts) == 1, "only the call that was under way"
    for _, infos in ends[1:]:
        with pytest.raises(CancelledError):
            infos["deferred_reward"][0].result()


def test_state_of_a_composite_reward_is_the_same(make: Any) -> None:
    spec = "jpeg_compressibility:1,jpeg_incompressibility:0.5"
    deferred, at_once = Composite(spec), Composite(spec)
    env, other = make(deferred), make(at_once, deferred_rewards=False)
    ends, expected = episodes(env, 3), episodes(other, 3)
    env.wait_for_rewards()
    assert deferred.state_dict() == at_once.state_dict()
    for (_, infos), (scores, _) in zip(ends, expected, strict=True):
        assert [reward.result() for reward in infos["deferred_reward"]] == scores.tolist()


@pytest.mark.parametrize("value", [1, "yes", None])
def test_anything_but_true_or_false_is_refused(make: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="deferred_rewards must be True or False"):
        make(brightness, deferred_rewards=value)


def test_a_single_environment_has_no_use_for_it() -> None:
    with pytest.raises(ValueError, match="deferred_rewards of one environment must be False.*got True"):
        gym.make("DDPO-SD-v0", deferred_rewards=True)


def test_it_is_public() -> None:
    assert ddpo_env.DeferredReward is DeferredReward
