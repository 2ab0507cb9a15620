"""Copies and pickles of an environment: the same model by name, without its weights."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from helpers.single_env import PROMPTS, STEPS, MakeEnv, episode, random_actions

import ddpo_env
from ddpo_env.models import loading


def test_observation_space_survives_pickling_with_what_the_policy_reads_there(make_env: MakeEnv) -> None:
    space = make_env(num_inference_steps=7).observation_space
    again = pickle.loads(pickle.dumps(space))
    assert again == space
    assert isinstance(again, ddpo_env.DenoisingObservationSpace)
    assert again.handle == space.handle
    assert again.handle.model is space.handle.model
    assert again.conditioning_keys == ("prompt_embeds",)
    assert again.sample() in space


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copied_environment_goes_on_with_the_same_model(make_env: MakeEnv, copied: Callable[[Any], Any]) -> None:
    env = make_env(render_mode="rgb_array")
    first, *others = random_actions(env)
    env.reset(seed=0)
    env.step(first)
    again = copied(env)
    assert again.unwrapped.batch.model is env.unwrapped.batch.model
    for action in others:
        np.testing.assert_equal(again.step(action), env.step(action))
    np.testing.assert_equal(again.reset(), env.reset())


def test_pickle_holds_no_weights_and_loads_them_where_they_are_not(make_env: MakeEnv) -> None:
    env = make_env()
    expected = episode(env)
    stored = pickle.dumps(env)
    assert len(stored) < 50_000
    loading.unload_models()
    again = pickle.loads(stored)
    assert again.unwrapped.batch.model is not env.unwrapped.batch.model
    np.testing.assert_equal(episode(again), expected)


def test_pickle_of_a_model_object_says_that_it_is_not_there(pipeline: StableDiffusionPipeline) -> None:
    own = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    env = gym.make("DDPO-SD-v0", model=own, prompts=PROMPTS, num_inference_steps=STEPS)
    stored = pickle.dumps(env)
    assert pickle.loads(stored).unwrapped.batch.model is env.unwrapped.batch.model
    loading.unload_models()
    del env, own
    gc.collect()
    with pytest.raises(ValueError, match="^model .* stands for a pipeline object that is gone"):
        pickle.loads(stored)
