"""A batch that is divided into parts starts as the whole batch does, also if a part begins inside a group."""

from itertools import chain

import numpy as np
import pytest
import torch
from helpers.micro_agents import STEPS, micro_env


def rollout(envs, seed):
    """Prompts and latents of three episodes of every sub-environment, those of all parts side by side."""
    prompts, latents = [], []
    for env in envs:
        observation, info = env.reset(seed=seed)
        told, seen = [list(info["prompt"])], [observation["latents"]]
        for _ in range(2):
            for _ in range(STEPS):
                observation, _, _, _, info = env.step(observation["latents"] * 0.9)
            told.append(list(info["prompt"]))
            seen.append(observation["latents"])
        prompts.append(told)
        latents.append(torch.stack(seen))
    side_by_side = [list(chain.from_iterable(row)) for row in zip(*prompts, strict=True)]
    return side_by_side, torch.cat(latents, dim=1)


@pytest.mark.parametrize(("samples_per_prompt", "count"), [(1, 2), (2, 3), (4, 2), (6, 3), (12, 4), (3, 6)])
def test_parts_begin_as_the_whole(micro_pipeline_folder, samples_per_prompt, count):
    arguments = {"samples_per_prompt": samples_per_prompt, "prompts": "imagenet_animals"}
    whole = [micro_env(micro_pipeline_folder, 12, **arguments)]
    parts = [micro_env(micro_pipeline_folder, 12 // count, part=(i, count), **arguments) for i in range(count)]
    expected, latents = rollout(whole, seed=7)
    prompts, others = rollout(parts, seed=7)
    assert prompts == expected
    assert torch.equal(others, latents)
    assert all(len(set(row)) > 1 for row in expected) or samples_per_prompt == 12


def test_part_goes_on_from_its_part_of_the_whole_state(micro_pipeline_folder):
    arguments = {"samples_per_prompt": 4, "prompts": "imagenet_animals"}
    whole = micro_env(micro_pipeline_folder, 4, **arguments)
    whole.reset(seed=3)
    tensors, state = whole.state_dict()
    part = micro_env(micro_pipeline_folder, 2, part=(1, 2), **arguments)
    part.load_state_dict(tensors, state)
    prompts = []
    for env, rows in ((whole, slice(2, 4)), (part, slice(None))):
        for _ in range(STEPS):
            observation, _, _, _, info = env.step(env.observe()["latents"])
        prompts.append((list(info["prompt"][rows]), observation["latents"][rows]))
    assert prompts[0][0] == prompts[1][0]
    assert torch.equal(prompts[0][1], prompts[1][1])


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0), (0,)])
def test_part_must_be_one_of_them(part):
    with pytest.raises(ValueError, match=r"part must be \(index, count\) with 0 <= index < count; got"):
        micro_env("tiny", 2, part=part)


def test_mask_selects_whole_groups_of_the_part(micro_pipeline_folder):
    env = micro_env(micro_pipeline_folder, 3, part=(1, 2), samples_per_prompt=2)  # numbers 3 | 4, 5 of the whole batch
    env.reset(seed=0)
    env.reset(options={"reset_mask": np.array([True, False, False])})
    with pytest.raises(ValueError, match="whole groups"):
        env.reset(options={"reset_mask": np.array([False, True, False])})
