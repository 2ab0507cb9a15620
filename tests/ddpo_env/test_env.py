"""`gym.make("DDPO-SD-v0")`: an episode of denoising, Gymnasium's and Stable-Baselines3's own checks, the wrappers."""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import RecordEpisodeStatistics, RecordVideo, TimeLimit
from helpers.single_env import PROMPTS, STEPS, MakeEnv, episode, random_actions
from PIL import Image
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import ddpo_env
from ddpo_env.spaces import ACTION_BOUND


@pytest.mark.parametrize("model", ["tiny", "micro"])
@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_gymnasium_check_env_finds_nothing(make_env: MakeEnv, model: str, render_mode: str | None) -> None:
    env = make_env(render_mode=render_mode, **({"model": "tiny"} if model == "tiny" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


def test_stable_baselines3_check_env_passes_with_advice_on_shapes_alone(make_env: MakeEnv) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sb3_check_env(make_env(render_mode="rgb_array"))
    advice = ("is an image", "minimal resolution for an image", "unconventional shape", "normalized Box action space")
    assert [str(one.message) for one in caught if not any(part in str(one.message) for part in advice)] == []


def test_everything_that_comes_out_is_in_its_space(make_env: MakeEnv) -> None:
    env = make_env()
    assert env.action_space.shape == (4, 8, 8)
    assert np.isfinite(env.action_space.low).all()
    assert np.isfinite(env.action_space.high).all()
    for observation, *_ in episode(env):
        assert observation in env.observation_space
        assert {name: value.shape for name, value in observation.items()} == {
            "latents": (4, 8, 8),
            "timestep": (1,),
            "prompt_embeds": (12, 16),
        }
        assert {value.dtype for value in observation.values()} == {np.dtype(np.float32)}


def test_reward_is_zero_until_the_last_step_which_terminates(make_env: MakeEnv) -> None:
    _, *steps = episode(make_env())
    assert [terminated for _, _, terminated, _, _ in steps] == [False] * (STEPS - 1) + [True]
    assert not any(truncated for _, _, _, truncated, _ in steps)
    assert [reward for _, reward, _, _, _ in steps[:-1]] == [0.0] * (STEPS - 1)
    assert steps[-1][1] < 0
    assert all(type(reward) is float for _, reward, _, _, _ in steps)
    assert [info for *_, info in steps[:-1]] == [{}] * (STEPS - 1)


def test_last_info_has_image_prompt_and_details(make_env: MakeEnv) -> None:
    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        return images.mean((1, 2, 3)), {"letters": [len(prompt) for prompt in prompts], "brand": ["x"] * len(images)}

    results = episode(make_env(reward=reward))
    info = results[-1][-1]
    assert set(info) == {"image", "prompt", "reward_details"}
    assert info["prompt"] == results[0][1]["prompt"]
    assert info["reward_details"] == {"letters": len(info["prompt"]), "brand": "x"}
    assert info["image"].dtype == np.uint8
    assert info["image"].shape == (32, 32, 3)
    assert results[-1][1] == pytest.approx(info["image"].mean())


def test_reward_is_the_jpeg_size_of_the_image_in_the_info(make_env: MakeEnv) -> None:
    *_, (_, reward, _, _, info) = episode(make_env(reward="jpeg_incompressibility"))
    buffer = io.BytesIO()
    Image.fromarray(info["image"]).save(buffer, "JPEG", quality=95)
    assert reward == len(buffer.getvalue()) / 1000


def test_image_is_the_stock_decoders(make_env: MakeEnv, pipeline: StableDiffusionPipeline) -> None:
    env = make_env()
    *_, (observation, _, _, _, info) = episode(env)
    latents = torch.as_tensor(random_actions(env)[-1:])
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    (expected,) = pipeline.image_processor.postprocess(decoded, output_type="pil")
    assert np.array_equal(info["image"], np.asarray(expected))
    assert np.array_equal(observation["latents"], latents[0])


@pytest.mark.parametrize("prompt", ["a cat", "a very long prompt that has to be cut off somewhere"])
def test_prompt_embeds_are_the_pipelines_own(make_env: MakeEnv, pipeline: StableDiffusionPipeline, prompt: str) -> None:
    observation, info = make_env().reset(options={"prompts": prompt})
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    assert info["prompt"] == prompt
    assert np.array_equal(observation["prompt_embeds"], expected[0])


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_timesteps_are_the_schedulers_own(make_env: MakeEnv, pipeline: StableDiffusionPipeline, steps: int) -> None:
    env = make_env(num_inference_steps=steps)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    observations = [env.reset()[0]] + [env.step(action)[0] for action in random_actions(env, steps=steps)]
    assert [float(observation["timestep"][0]) for observation in observations] == [*scheduler.timesteps.tolist(), 0]


def test_the_action_is_the_next_latent(make_env: MakeEnv) -> None:
    env = make_env()
    results = episode(env)
    for action, (observation, *_) in zip(random_actions(env), results[1:], strict=True):
        assert np.array_equal(observation["latents"], action)
        assert np.array_equal(observation["prompt_embeds"], results[0][0]["prompt_embeds"])


def test_same_seed_same_episode(make_env: MakeEnv) -> None:
    first, again, other = episode(make_env(), 3), episode(make_env(), 3), episode(make_env(), 4)
    np.testing.assert_equal(first, again)
    assert not np.array_equal(first[0][0]["latents"], other[0][0]["latents"])


def test_episodes_after_a_seed_are_reproducible_but_differ(make_env: MakeEnv) -> None:
    env = make_env()
    env.reset(seed=5)
    second, _ = env.reset()
    third, _ = env.reset()
    env.reset(seed=5)
    again, _ = env.reset()
    assert np.array_equal(second["latents"], again["latents"])
    assert not np.array_equal(second["latents"], third["latents"])


def test_prompts_come_from_the_set(make_env: MakeEnv) -> None:
    env = make_env()
    assert {env.reset(seed=seed)[1]["prompt"] for seed in range(40)} == set(PROMPTS)


def test_noise_of_a_seed_does_not_depend_on_the_prompt(make_env: MakeEnv) -> None:
    env = make_env()
    drawn, _ = env.reset(seed=8)
    given, _ = env.reset(seed=8, options={"prompts": "an owl"})
    assert np.array_equal(drawn["latents"], given["latents"])


def test_initial_noise_is_standard_normal(make_env: MakeEnv) -> None:
    env = make_env()
    noise = np.stack([env.reset(seed=seed)[0]["latents"] for seed in range(64)])
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_generator_of_the_environment_is_the_one_that_samples(make_env: MakeEnv) -> None:
    env = make_env().unwrapped
    first, _ = env.reset(seed=7)
    env.np_random = np.random.default_rng(7)
    second, _ = env.reset()
    assert np.array_equal(second["latents"], np.random.default_rng(7).standard_normal((4, 8, 8), np.float32))
    assert not np.array_equal(first["latents"], env.reset()[0]["latents"])


def test_seed_is_that_of_the_environment_and_of_its_batch(make_env: MakeEnv) -> None:
    env: Any = make_env().unwrapped
    env.reset(seed=7)
    env.reset()
    assert (env.np_random_seed, env.batch.np_random_seed) == (7, (7,))
    env.np_random = np.random.default_rng(7)
    assert (env.np_random_seed, env.batch.np_random_seed) == (-1, (-1,))


def test_refused_reset_leaves_the_generator_alone(make_env: MakeEnv) -> None:
    env = make_env().unwrapped
    env.reset(seed=7)
    before = copy.deepcopy(env.np_random)
    with pytest.raises(ValueError, match="options"):
        env.reset(seed=8, options={"latents": 3})
    assert env.np_random.bit_generator.state == before.bit_generator.state


def test_signature_is_that_of_the_batch(make_env: MakeEnv) -> None:
    own, of_batch = (
        {name: (one.default, one.annotation) for name, one in inspect.signature(kind).parameters.items()}
        for kind in (ddpo_env.DenoisingEnv, ddpo_env.DenoisingVectorEnv)
    )
    modes = own.pop("autoreset_mode"), of_batch.pop("autoreset_mode")
    assert own == of_batch
    assert [default for default, _ in modes] == [AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP]
    with pytest.raises(TypeError, match="DenoisingEnv.* unexpected keyword argument 'num_inference_step'"):
        make_env(num_inference_step=3)


def test_close_closes_the_batch(make_env: MakeEnv) -> None:
    env: Any = make_env()
    env.close()
    env.close()
    assert env.unwrapped.batch.closed


def test_returned_observations_and_infos_are_never_written_to_again(make_env: MakeEnv) -> None:
    env = make_env(reward=lambda images, *_: (np.zeros(len(images)), {"zero": [0.0] * len(images)}))
    kept = [*episode(env, 1), *episode(env, 2)]
    copies = pickle.loads(pickle.dumps(kept))
    episode(env, 3)
    np.testing.assert_equal(kept, copies)


def test_writing_to_an_observation_or_action_does_not_reach_the_environment(make_env: MakeEnv) -> None:
    env = make_env(render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    for value in observation.values():
        value[:] = 9
    action = random_actions(env)[0]
    following, *_ = env.step(action)
    image = env.render()
    action[:] = 9
    assert not (following["prompt_embeds"] == 9).any()
    assert np.array_equal(env.render(), image)


def test_render_is_the_decoded_current_latent(make_env: MakeEnv, pipeline: StableDiffusionPipeline) -> None:
    env = make_env(render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    frames = [env.render()]
    latents = [observation["latents"]]
    for action in random_actions(env):
        *_, info = env.step(action)
        frames.append(env.render())
        latents.append(action)
    for frame, latent in zip(frames, latents, strict=True):
        with torch.no_grad():
            decoded = pipeline.vae.decode(torch.as_tensor(latent)[None] / pipeline.vae.config.scaling_factor).sample
        expected = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        assert np.array_equal(frame, np.asarray(expected))
    assert np.array_equal(frames[-1], info["image"])


def test_render_without_a_render_mode_is_nothing(make_env: MakeEnv) -> None:
    env = make_env().unwrapped
    env.reset()
    assert env.render() is None


def test_options_fix_prompt_and_initial_noise(make_env: MakeEnv) -> None:
    env = make_env()
    latents = np.full((4, 8, 8), 0.25, np.float32)
    observation, info = env.reset(seed=0, options={"prompts": "an owl", "latents": latents})
    assert info == {"prompt": "an owl"}
    assert np.array_equal(observation["latents"], latents)
    observation, info = env.reset(options={"prompts": ["an owl"], "latents": torch.as_tensor(latents)[None]})
    assert info == {"prompt": "an owl"}
    assert np.array_equal(observation["latents"], latents)
    assert env.reset(seed=0)[1]["prompt"] in PROMPTS, "options hold for one episode"


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda action: action.tolist(), np.float64])
def test_an_action_may_be_an_array_a_tensor_or_a_list(make_env: MakeEnv, kind: Callable[[Any], Any]) -> None:
    env = make_env().unwrapped
    env.reset()
    action = random_actions(env)[0]
    assert np.array_equal(env.step(kind(action))[0]["latents"], action)


def test_an_action_beyond_the_bounds_is_taken_as_it_is(make_env: MakeEnv) -> None:
    env = make_env().unwrapped
    env.reset()
    action = np.full((4, 8, 8), 2 * ACTION_BOUND, np.float32)
    assert np.array_equal(env.step(action)[0]["latents"], action)


@pytest.mark.parametrize("ended", [False, True])
def test_step_needs_a_reset(make_env: MakeEnv, ended: bool) -> None:
    env = make_env().unwrapped
    if ended:
        episode(env)
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(random_actions(env)[0])
    env.reset()
    assert env.step(random_actions(env)[0])[2] is False


def test_torch_backend_gives_the_same_values_as_tensors(make_env: MakeEnv) -> None:
    arrays, tensors = make_env().unwrapped, make_env(backend="torch").unwrapped
    for ours, theirs in zip(episode(arrays), episode(tensors), strict=True):
        assert all(isinstance(value, torch.Tensor) for value in theirs[0].values())
        np.testing.assert_equal(ours[0], {name: value.numpy() for name, value in theirs[0].items()})
        np.testing.assert_equal(ours[1:], theirs[1:])


def test_torch_backend_never_writes_to_a_tensor_that_it_gave(make_env: MakeEnv) -> None:
    env = make_env(backend="torch").unwrapped
    kept = [*episode(env, 1), *episode(env, 2)]
    copies = pickle.loads(pickle.dumps(kept))
    episode(env, 3)
    for before, after in zip(copies, kept, strict=True):
        assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def test_record_video_films_the_denoising(make_env: MakeEnv, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moviepy's own
        env = RecordVideo(make_env(render_mode="rgb_array"), str(tmp_path), disable_logger=True)
        episode(env)
        env.close()
    (film,) = tmp_path.glob("*.mp4")
    assert film.stat().st_size > 0


def test_record_episode_statistics(make_env: MakeEnv) -> None:
    *_, (_, reward, _, _, info) = episode(RecordEpisodeStatistics(make_env()))
    assert info["episode"]["l"] == STEPS
    assert info["episode"]["r"] == pytest.approx(reward)


def test_time_limit_truncates_and_the_next_episode_is_whole(make_env: MakeEnv) -> None:
    env = TimeLimit(make_env(), 2)
    env.reset()
    first, second, *_ = random_actions(env)
    assert env.step(first)[2:4] == (False, False)
    assert env.step(second)[2:4] == (False, True)
    env.reset()
    assert env.step(first)[2:4] == (False, False)


def test_a_scheduler_whose_last_step_has_no_noise_is_still_an_environment(pipeline: StableDiffusionPipeline) -> None:
    deterministic = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    deterministic.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, set_alpha_to_one=True, steps_offset=0
    )
    env = gym.make("DDPO-SD-v0", model=deterministic, prompts=PROMPTS, num_inference_steps=STEPS)
    results = episode(env)
    assert results[0][0]["timestep"] == 750
    assert results[-1][2] is True
    assert np.isfinite(results[-1][1])
