"""`gym.make_vec("DDPO-SD-v0")`: the native batch against single environments and Gymnasium's own vectorization."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import DictInfoToList, FlattenObservation, RecordEpisodeStatistics, RecordVideo

import ddpo_env

STEPS = 3
PROMPTS = ["a cat", "an ant", "a dog", "a fox"]
SHAPE = (4, 8, 8)
MakeVec = Callable[..., VectorEnv[Any, Any, Any]]


def mean_colour(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
    """A reward with details of several types; at module level, so that another process can import it."""
    means = images.mean((1, 2, 3))
    return means, {"red": images[..., 0].mean((1, 2)), "letters": [len(prompt) for prompt in prompts], "word": prompts}


@pytest.fixture
def make_vec(micro_pipeline_folder: Path) -> MakeVec:
    def make(num_envs: int = 3, **arguments: Any) -> VectorEnv[Any, Any, Any]:
        defaults = {"model": str(micro_pipeline_folder), "prompts": PROMPTS, "num_inference_steps": STEPS}
        return gym.make_vec("DDPO-SD-v0", num_envs=num_envs, **defaults | arguments)

    return make


def random_actions(num_envs: int, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, num_envs, *SHAPE), np.float32)


def run(env: VectorEnv[Any, Any, Any], steps: int = STEPS, seed: int = 0, action_seed: int = 0) -> list[Any]:
    results: list[Any] = [env.reset(seed=seed)]
    return results + [env.step(actions) for actions in random_actions(env.num_envs, steps, action_seed)]


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal in keys, types, shapes, dtypes and every value."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert set(ours) == set(theirs)
        for name in ours:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, tuple | list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, np.ndarray):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if ours.dtype == object:
            assert_same(ours.tolist(), theirs.tolist())
        else:
            assert np.array_equal(ours, theirs)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def test_make_vec_gives_the_native_batch(make_vec: MakeVec) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_vec()
    assert isinstance(env, ddpo_env.DenoisingVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.num_envs == 3
    assert isinstance(env.single_observation_space, ddpo_env.DenoisingObservationSpace)


def test_everything_that_comes_out_is_in_its_space(make_vec: MakeVec) -> None:
    env = make_vec()
    assert env.action_space.shape == (3, *SHAPE)
    for observation, *_ in run(env, 2 * STEPS):
        assert observation in env.observation_space
        assert all(
            {name: value[index] for name, value in observation.items()} in env.single_observation_space
            for index in range(3)
        )


def test_types_of_a_step(make_vec: MakeVec) -> None:
    *_, (_, rewards, terminations, truncations, infos) = run(make_vec())
    assert (rewards.dtype, rewards.shape) == (np.dtype(np.float64), (3,))
    assert terminations.dtype == truncations.dtype == np.dtype(bool)
    assert terminations.all()
    assert not truncations.any()
    assert (infos["image"].dtype, infos["image"].shape) == (np.dtype(np.uint8), (3, 32, 32, 3))


def test_same_seed_same_batch_and_sub_environments_differ(make_vec: MakeVec) -> None:
    first, again, other = run(make_vec(), 7, 1), run(make_vec(), 7, 1), run(make_vec(), 7, 2)
    assert_same(first, again)
    noise = first[0][0]["latents"]
    assert len({row.tobytes() for row in noise}) == 3
    assert not np.array_equal(noise, other[0][0]["latents"])


@pytest.mark.parametrize("model", ["micro", "tiny"])
def test_sub_environment_of_a_batch_is_the_single_environment_of_its_seed(make_vec: MakeVec, model: str) -> None:
    arguments: dict[str, Any] = {"model": "tiny"} if model == "tiny" else {}
    env = make_vec(3, reward=mean_colour, **arguments)
    results = run_own(env, seed=11)
    for index in range(3):
        single = make_vec(1, reward=mean_colour, **arguments)
        ours = run_own(single, seed=11 + index, index=index)
        for batch_step, single_step in zip(results, ours, strict=True):
            for name, value in single_step[0].items():
                assert np.array_equal(batch_step[0][name][index], value[0])
        assert results[-1][1][index] == ours[-1][1][0]
        assert np.array_equal(results[-1][-1]["image"][index], ours[-1][-1]["image"][0])


def run_own(env: VectorEnv[Any, Any, Any], seed: int, index: int | None = None) -> list[Any]:
    """An episode with actions of the action space's shape; those of one of three if `index` is given."""
    shape = env.single_action_space.shape
    actions = np.random.default_rng(0).standard_normal((STEPS, 3, *shape), np.float32)
    results: list[Any] = [env.reset(seed=seed)]
    return results + [env.step(step if index is None else step[index : index + 1]) for step in actions]


@pytest.mark.parametrize("mode", AutoresetMode)
def test_native_batch_equals_gymnasiums_sync_vectorization(make_vec: MakeVec, mode: AutoresetMode) -> None:
    native = make_vec(autoreset_mode=mode, reward=mean_colour)
    sync = make_vec(vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, reward=mean_colour)
    assert native.observation_space == sync.observation_space
    assert native.action_space == sync.action_space
    assert native.metadata == sync.metadata
    assert_same(native.reset(seed=5), sync.reset(seed=5))
    assert native.np_random_seed == sync.np_random_seed == (5, 6, 7)
    ended = 0
    for number, actions in enumerate(random_actions(3, 4 * STEPS)):
        if number == 1:  # out of phase from here on
            mask = np.array([False, True, False])
            assert_same(
                native.reset(seed=9, options={"reset_mask": mask}), sync.reset(seed=9, options={"reset_mask": mask})
            )
        ours, theirs = native.step(actions), sync.step(actions)
        assert_same(ours, theirs)
        ended += int(ours[2].sum())
        if mode is AutoresetMode.DISABLED and ours[2].any():
            assert_same(
                native.reset(options={"reset_mask": ours[2].copy()}), sync.reset(options={"reset_mask": ours[2].copy()})
            )
    assert ended >= 8


def test_options_mean_the_same_in_sync_vectorization(make_vec: MakeVec) -> None:
    native, sync = make_vec(), make_vec(vectorization_mode="sync")
    options = {"prompts": "an owl", "latents": np.ones(SHAPE, np.float32)}
    assert_same(native.reset(seed=1, options=dict(options)), sync.reset(seed=1, options=dict(options)))


@pytest.mark.timeout(120)
def test_async_vectorization_gives_the_same_episodes(make_vec: MakeVec) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(512, 512) @ torch.randn(512, 512)  # starts the threads that a forked worker does not have
    apart = make_vec(2, reward=mean_colour, vectorization_mode="async")
    try:
        assert_same(run(make_vec(2, reward=mean_colour), STEPS + 1), run(apart, STEPS + 1))
    finally:
        apart.close(terminate=True)
        torch.set_num_threads(threads)


def test_next_step_mode_ignores_the_actions_of_sub_environments_that_begin(make_vec: MakeVec) -> None:
    env = make_vec(2)
    run(env)
    actions = np.full((2, *SHAPE), 5, np.float32)
    observation, rewards, terminations, _, infos = env.step(actions)
    assert not (observation["latents"] == 5).any()
    assert not terminations.any()
    assert rewards.tolist() == [0, 0]
    assert infos["_prompt"].tolist() == [True, True]
    assert (observation["timestep"] == run(env)[0][0]["timestep"]).all()


def test_next_step_mode_where_some_sub_environments_begin_while_others_end(make_vec: MakeVec) -> None:
    env = make_vec(3)
    run(env, 1)
    env.reset(options={"reset_mask": np.array([True, False, False])})
    first, second, third = random_actions(3)
    env.step(first)
    *_, terminations, _, infos = env.step(second)
    assert terminations.tolist() == [False, True, True]
    observation, rewards, terminations, _, infos = env.step(third)
    assert terminations.tolist() == [True, False, False]
    assert infos["_image"].tolist() == [True, False, False]
    assert infos["_prompt"].tolist() == [True, True, True]
    assert set(infos["prompt"]) <= set(PROMPTS)
    assert (rewards != 0).tolist() == [True, False, False]
    assert np.array_equal(observation["latents"][0], third[0])
    assert observation["timestep"][0] == 0
    assert (observation["timestep"][1:] == env.reset()[0]["timestep"][1:]).all()


def test_same_step_mode_keeps_the_last_observation(make_vec: MakeVec) -> None:
    env = make_vec(2, autoreset_mode="SameStep")
    *_, (observation, rewards, terminations, _, infos) = run(env)
    assert terminations.all()
    assert (rewards < 0).all()
    for index in range(2):
        assert np.array_equal(infos["final_obs"][index]["latents"], random_actions(2)[-1][index])
        assert infos["final_obs"][index]["timestep"] == 0
        assert not np.array_equal(observation["latents"][index], infos["final_obs"][index]["latents"])
    assert (observation["timestep"] > 0).all()
    assert infos["final_info"]["image"].shape == (2, 32, 32, 3)
    assert "image" not in infos
    *_, infos = env.step(random_actions(2)[0])
    assert infos == {}


def test_disabled_mode_demands_a_reset(make_vec: MakeVec) -> None:
    env = make_vec(2, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(random_actions(2)[0])
    run(env)
    with pytest.raises(ResetNeeded, match=r"sub-environments \[0, 1\] have ended.*autoreset is disabled"):
        env.step(random_actions(2)[0])
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ResetNeeded, match=r"sub-environments \[1\] have ended"):
        env.step(random_actions(2)[0])
    env.reset(options={"reset_mask": np.array([False, True])})
    env.step(random_actions(2)[0])


def test_a_masked_reset_leaves_the_other_sub_environments_alone(make_vec: MakeVec) -> None:
    env = make_vec()
    before = run(env, 1)[-1][0]
    after, infos = env.reset(seed=50, options={"reset_mask": np.array([False, True, False])})
    for index in (0, 2):
        assert all(np.array_equal(before[name][index], after[name][index]) for name in before)
    assert infos["_prompt"].tolist() == [False, True, False]
    assert infos["prompt"].tolist()[::2] == [None, None]
    assert np.array_equal(after["latents"][1], make_vec(1).reset(seed=51)[0]["latents"][0])


def test_samples_per_prompt_share_prompts_in_rows(make_vec: MakeVec) -> None:
    env = make_vec(12, samples_per_prompt=3, prompts="simple_animals", autoreset_mode="SameStep")
    plain = make_vec(12, prompts="simple_animals")
    for seed in range(3):
        observation, infos = env.reset(seed=seed)
        rows = infos["prompt"].reshape(4, 3)
        assert all(len(set(row)) == 1 for row in rows)
        assert len({row[0] for row in rows}) > 1
        embeds = observation["prompt_embeds"].reshape(4, 3, -1)
        assert (embeds == embeds[:, :1]).all()
        assert np.array_equal(observation["latents"], plain.reset(seed=seed)[0]["latents"])
    *_, infos = run(env)[-1]
    assert all(len(set(row)) == 1 for row in infos["prompt"].reshape(4, 3))
    assert all(len(set(row)) == 1 for row in infos["final_info"]["prompt"].reshape(4, 3))


def test_metadata_of_prompts_reaches_the_reward(make_vec: MakeVec) -> None:
    seen: list[Any] = []

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        seen.extend(zip(prompts, metadata, strict=True))
        return [0.0] * len(images)

    env = make_vec(4, prompts="counting", reward=reward)
    env.reset(seed=0, options={"prompts": ["two dogs", "three cats", "a thing", "two dogs"]})
    for actions in random_actions(4):
        env.step(actions)
    assert [prompt for prompt, _ in seen] == ["two dogs", "three cats", "a thing", "two dogs"]
    assert [metadata.get("answers") for _, metadata in seen] == [
        ("two", "dogs"),
        ("three", "cats"),
        None,
        ("two", "dogs"),
    ]


def test_render_returns_the_decoded_latents_of_every_sub_environment(make_vec: MakeVec) -> None:
    env = make_vec(2, render_mode="rgb_array")
    with pytest.raises(ResetNeeded):
        env.render()
    *_, infos = run(env)[-1]
    frames = env.render()
    assert isinstance(frames, tuple)
    assert np.array_equal(np.stack(frames), infos["image"])
    assert make_vec(2).render() is None


def test_torch_backend_gives_the_same_values_as_tensors(make_vec: MakeVec) -> None:
    arrays, tensors = make_vec(autoreset_mode="SameStep"), make_vec(autoreset_mode="SameStep", backend="torch")
    for ours, theirs in zip(run(arrays, 2 * STEPS), run(tensors, 2 * STEPS), strict=True):
        assert all(isinstance(value, torch.Tensor) for value in theirs[0].values())
        assert_same(ours[0], {name: value.numpy() for name, value in theirs[0].items()})
        np.testing.assert_equal(ours[1:4], theirs[1:4])
    assert isinstance(theirs[-1]["final_obs"][0]["latents"], torch.Tensor)
    tensors.reset(seed=0)
    observation, *_ = tensors.step(torch.ones(3, *SHAPE, dtype=torch.float64))
    assert observation["latents"].dtype == torch.float32
    assert (observation["latents"] == 1).all()


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_what_was_returned_is_never_written_to_again(make_vec: MakeVec, mode: AutoresetMode, backend: str) -> None:
    env = make_vec(backend=backend, autoreset_mode=mode, reward=mean_colour)
    kept, copies = [], []
    for seed in range(3):
        for result in run(env, STEPS if mode is AutoresetMode.DISABLED else STEPS + 1, seed, action_seed=seed):
            kept.append(result)
            copies.append(copy.deepcopy(result))
    assert_same(copies, kept)


def test_vector_record_episode_statistics(make_vec: MakeVec) -> None:
    *_, (_, rewards, _, _, infos) = run(RecordEpisodeStatistics(make_vec()))
    assert infos["episode"]["l"].tolist() == [STEPS] * 3
    assert np.allclose(infos["episode"]["r"], rewards)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_dict_info_to_list(make_vec: MakeVec, mode: AutoresetMode) -> None:
    env = DictInfoToList(make_vec(autoreset_mode=mode, reward=mean_colour))
    (_, infos), *_, (_, _, _, _, last) = run(env)
    assert [set(info) for info in infos] == [{"prompt"}] * 3
    finals = [info["final_info"] for info in last] if mode is AutoresetMode.SAME_STEP else last
    assert all(info["image"].shape == (32, 32, 3) for info in finals)
    assert all(info["reward_details"]["word"] == info["prompt"] for info in finals)


def test_vector_flatten_observation(make_vec: MakeVec) -> None:
    env = FlattenObservation(make_vec(2))
    for observation, *_ in run(env):
        assert observation.shape == (2, 4 * 8 * 8 + 1 + 12 * 16)
        assert observation in env.observation_space


def test_vector_record_video(make_vec: MakeVec, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moviepy's own
        env = RecordVideo(make_vec(2, render_mode="rgb_array"), str(tmp_path), video_aspect_ratio=(2, 1))
        run(env, STEPS + 2)
        env.close()
    assert list(tmp_path.glob("*.mp4"))


def test_a_state_goes_through_json_and_continues_the_same(make_vec: MakeVec) -> None:
    env, other = (make_vec(autoreset_mode="SameStep", reward=mean_colour) for _ in range(2))
    run(env, STEPS + 1)
    tensors, state = env.state_dict()
    other.reset(seed=99)
    other.load_state_dict(dict(tensors), json.loads(json.dumps(state)))
    assert_same(other.observe(), env.observe())
    for actions in random_actions(3, 2 * STEPS, seed=4):
        assert_same(env.step(actions), other.step(actions))
    with pytest.raises(ValueError, match=r"num_envs=2.*3"):
        make_vec(2).load_state_dict(tensors, state)


def test_a_state_from_before_the_first_reset_still_needs_a_reset(make_vec: MakeVec) -> None:
    env, other = make_vec(), make_vec()
    other.load_state_dict(*env.state_dict())
    with pytest.raises(ResetNeeded):
        other.step(random_actions(3)[0])
    assert_same(env.reset()[0], other.reset()[0])
