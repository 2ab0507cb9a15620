"""Rewards that are not known when an episode ends: computed in a thread, or measured for several processes."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from helpers.micro_agents import brightness
from helpers.stateful_rewards import Remembering, Shareable

from ddpo_env import DeferredReward, DenoisingVectorEnv

STEPS = 2


def make(num_envs: int = 3, **arguments: Any) -> DenoisingVectorEnv:
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "device": "cpu", "reward": Shareable()}
    return DenoisingVectorEnv(num_envs, **settings | arguments)


def last_step(env: DenoisingVectorEnv, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """Rewards and infos of the last step of an episode."""
    observation, _ = env.reset(seed=seed)
    for _ in range(STEPS):
        observation, rewards, _, _, infos = env.step(observation["latents"] * 0.5)
    return rewards, infos


@pytest.mark.parametrize("deferred_rewards", [False, True])
def test_part_of_a_batch_measures(deferred_rewards: bool) -> None:
    reward = Shareable()
    env = make(reward=reward, part=(1, 2), deferred_rewards=deferred_rewards)
    assert env.reward is reward
    rewards, infos = last_step(env)
    assert rewards.tolist() == [0, 0, 0]
    assert "reward_details" not in infos
    pending: list[DeferredReward] = list(infos["deferred_reward"])
    expected = brightness(infos["image"], list(infos["prompt"]), [{}] * 3)
    assert all(one.is_measured for one in pending)
    assert [one.measurement() for one in pending] == expected.tolist()
    assert all(one.done() for one in pending)
    assert [one.details() for one in pending] == [{}] * 3
    assert reward.seen == 0, "only combining changes the state"
    for one in pending:
        with pytest.raises(RuntimeError, match="only measured the sample.*combine_measurements"):
            one.result()
    env.close()


def test_parts_measure_what_the_whole_batch_measures() -> None:
    whole, _ = last_step(make(4, reward=brightness))
    parts = [last_step(make(2, part=(index, 2)))[1]["deferred_reward"] for index in range(2)]
    assert [one.measurement() for part in parts for one in part] == whole.tolist()


def test_reward_in_one_stage_scores_in_every_part() -> None:
    rewards, infos = last_step(make(reward=brightness, part=(0, 2)))
    assert (rewards > 0).all()
    assert "deferred_reward" not in infos


def test_one_process_scores_with_a_two_stage_reward() -> None:
    rewards, infos = last_step(make())
    assert (rewards != 0).all()
    assert infos["reward_details"]["seen"].tolist() == [3.0] * 3


def test_reward_with_a_state_of_its_own_cannot_be_shared() -> None:
    make(reward=Remembering())
    with pytest.raises(ValueError, match="Remembering"):
        make(reward=Remembering(), part=(0, 2))


def test_measuring_that_fails_is_an_error_of_the_step() -> None:
    class Failing(Shareable):
        def measure(self, *batch: Any) -> np.ndarray:
            raise ArithmeticError("no measure")

    with pytest.raises(ArithmeticError, match="no measure"):
        last_step(make(reward=Failing(), part=(0, 2)))
    env = make(reward=Failing(), part=(0, 2), deferred_rewards=True)
    _, infos = last_step(env)
    for ask in ("measurement", "result", "details"):
        with pytest.raises(ArithmeticError, match="no measure"):
            getattr(infos["deferred_reward"][0], ask)()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copy_has_a_thread_of_its_own(copied: Callable[[Any], Any]) -> None:
    env = make(deferred_rewards=True, reward=brightness)
    env.reset(seed=0)
    again = copied(env)
    env.close()
    _, infos = last_step(again)
    assert infos["deferred_reward"][0].result() > 0
    again.close()


def test_scored_reward_has_no_measurement_and_does_not_wait_for_that() -> None:
    go_on = threading.Event()

    def slow(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        assert go_on.wait(60)
        return brightness(images, prompts, metadata)

    env = make(reward=slow, deferred_rewards=True, autoreset_mode=AutoresetMode.SAME_STEP)
    rewards, infos = last_step(env)
    pending = infos["final_info"]["deferred_reward"]
    assert rewards.tolist() == [0, 0, 0]
    assert [(one.done(), one.measurement(), one.is_measured) for one in pending] == [(False, None, False)] * 3
    go_on.set()
    expected = brightness(infos["final_info"]["image"], [], [])
    assert [one.result() for one in pending] == expected.tolist()
    env.close()
