"""What users get wrong: every error names the parameter, what came and what is valid, before any weights are loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import VectorEnv

import ddpo_env
from ddpo_env import vector_env
from ddpo_env.models import loading as models

PROMPTS = ["a cat", "an ant"]
SHAPE = (4, 8, 8)
MakeVec = Callable[..., VectorEnv[Any, Any, Any]]

BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"reward": "astetic"}, "reward must be one of jpeg_compressibility, .*'astetic'"),
    ({"reward": "no_such_module:reward"}, "no_such_module:reward"),
    ({"prompts": "simple_animal"}, "prompts must be one of simple_animals, .*'simple_animal'"),
    ({"prompts": []}, "prompts must hold at least one prompt"),
    ({"prompts": ["a cat", " "]}, r"prompts\[1\] must not be empty; got ' '"),
    ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000000; got 0"),
    ({"num_inference_steps": -3}, "num_inference_steps must be an integer from 1 to 1000000; got -3"),
    ({"num_inference_steps": 2.5}, "num_inference_steps must be an integer from 1 to 1000000; got 2.5"),
    ({"num_inference_steps": "20"}, "num_inference_steps must be an integer from 1 to 1000000; got '20'"),
    ({"num_inference_steps": True}, "num_inference_steps must be an integer from 1 to 1000000; got True"),
    ({"backend": "jax"}, "backend must be one of numpy, torch; got 'jax'"),
    ({"render_mode": "ansi"}, "render_mode must be None or 'rgb_array'; got 'ansi'"),
]
BAD_BATCHES: list[tuple[dict[str, Any], str]] = [
    ({"num_envs": 0}, "num_envs must be an integer from 1 to 1000000; got 0"),
    ({"num_envs": 1.0}, "num_envs must be an integer from 1 to 1000000; got 1.0"),
    ({"num_envs": 4, "samples_per_prompt": 3}, "samples_per_prompt must divide num_envs=4; got 3"),
    ({"samples_per_prompt": 0}, "samples_per_prompt must be an integer from 1 to 1000000; got 0"),
    ({"autoreset_mode": "NEXT"}, "autoreset_mode must be one of 'NextStep', 'SameStep', 'Disabled'; got 'NEXT'"),
]
BAD_SINGLES: list[tuple[dict[str, Any], str]] = [
    ({"num_envs": 2}, "num_envs of one environment must be 1.*make_vec.*got 2"),
    ({"samples_per_prompt": 2}, "samples_per_prompt of one environment must be 1.*got 2"),
    ({"autoreset_mode": "SameStep"}, "autoreset_mode of one environment must be 'Disabled'.*got 'SameStep'"),
]
BAD_MODELS: list[tuple[dict[str, Any], str]] = [
    ({"model": "tny"}, r"model must be a bundled name \(tiny, points, sd14-random\), a folder.*Hub id.*'tny'"),
    (
        {"model": "./no/such/folder"},
        r"model must be a bundled name \(tiny, points, sd14-random\), a folder.*no/such/folder",
    ),
    (
        {"model": Path("no/such")},
        r"model must be a bundled name \(tiny, .*\), a folder or a .safetensors file that exists.*no/such",
    ),
    ({"model": 5}, r"model must be a bundled name \(tiny, points, sd14-random\).*got a int, 5"),
    ({"model": torch.nn.Linear(1, 1)}, r"model must be a bundled name \(tiny, points, sd14-random\).*got a Linear"),
    ({"model": "pipeline/7f00"}, "pipeline/7f00.*pass it again"),
    ({"device": "cuda:99"}, "device must be auto or one of cpu.*'cuda:99'"),
    ({"device": "tpu9"}, "device must be auto or one of cpu.*'tpu9'"),
    ({"device": None}, "device must be auto or one of cpu.*None"),
    ({"device": "meta"}, "device must be auto or one of cpu.*'meta'"),
    ({"dtype": "float8"}, "dtype must be auto or one of float32, float16, bfloat16; got 'float8'"),
    ({"dtype": torch.float64}, "dtype must be auto or one of float32, float16, bfloat16; got torch.float64"),
    ({"dtype": None}, "dtype must be auto or one of float32, float16, bfloat16; got None"),
]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "_loaded", {})
    monkeypatch.setattr(models, "load_pipeline", load)


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch, no_loading: None) -> None:
    monkeypatch.setattr(vector_env, "load_model", models.load_pipeline)


@pytest.fixture
def make_vec(micro_pipeline_folder: Path) -> MakeVec:
    def make(num_envs: int = 2, **arguments: Any) -> VectorEnv[Any, Any, Any]:
        defaults = {"model": str(micro_pipeline_folder), "prompts": PROMPTS, "num_inference_steps": 2}
        return gym.make_vec("DDPO-SD-v0", num_envs=num_envs, **defaults | arguments)

    return make


def zeros(num_envs: int = 2) -> np.ndarray:
    return np.zeros((num_envs, *SHAPE), np.float32)


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS + BAD_BATCHES)
def test_batch_refuses_before_it_asks_for_a_model(never_asked: None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddpo_env.DenoisingVectorEnv(**arguments)


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS + BAD_SINGLES)
def test_environment_refuses_before_it_asks_for_a_model(
    never_asked: None, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ddpo_env.DenoisingEnv(**arguments)


@pytest.mark.parametrize(("arguments", "message"), BAD_MODELS)
def test_model_device_and_dtype_are_refused_before_loading(
    no_loading: None, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make("DDPO-SD-v0", **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "must hold at least one prompt"), ("a cat\n\na dog\n", "line 2"), ("# nothing\n", "at least one prompt")],
)
def test_prompt_files_are_read_before_loading(never_asked: None, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        gym.make("DDPO-SD-v0", prompts=str(path))


def test_unknown_argument_is_named(never_asked: None) -> None:
    with pytest.raises(TypeError, match="num_inference_step'"):
        gym.make("DDPO-SD-v0", num_inference_step=20)


def test_one_environment_may_be_told_what_it_is_anyway(micro_pipeline_folder: Path) -> None:
    env = ddpo_env.DenoisingEnv(
        model=micro_pipeline_folder, num_envs=1, samples_per_prompt=1, autoreset_mode="Disabled", prompts=PROMPTS
    )
    assert env.reset()[1]["prompt"] in PROMPTS


def test_more_steps_than_the_model_was_trained_on(make_vec: MakeVec) -> None:
    with pytest.raises(ValueError, match=r"num_inference_steps must be between 1 and 1000.*1001"):
        make_vec(num_inference_steps=1001)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 4, 8, 9)), r"actions must have shape \(2, 4, 8, 8\); got \(2, 4, 8, 9\)"),
        (np.zeros(SHAPE), r"actions must have shape \(2, 4, 8, 8\); got \(4, 8, 8\)"),
        (0.0, r"actions must have shape \(2, 4, 8, 8\); got \(\)"),
        (np.full((2, *SHAPE), np.nan), r"actions must be finite; .* sub-environments \[0, 1\]"),
        (np.stack([np.zeros(SHAPE), np.full(SHAPE, np.inf)]), r"actions must be finite; .* sub-environments \[1\]"),
        (np.full((2, *SHAPE), 1e39), r"actions must be finite"),
        (np.full((2, *SHAPE), "x"), "actions must be an array or a tensor of real numbers"),
    ],
)
def test_bad_actions_are_refused_and_change_nothing(
    make_vec: MakeVec, backend: str, actions: Any, message: str
) -> None:
    env = make_vec(backend=backend)
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    after = env.observe()
    assert all((before[name] == after[name]).all() for name in before)
    assert not env.step(zeros())[2].any(), "the refused step was not counted"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((4, 8)), r"action must have shape \(4, 8, 8\); got \(4, 8\)"),
        (np.full(SHAPE, np.nan), "must be finite; got NaN"),
        (np.full(SHAPE, np.inf), "must be finite; got NaN or inf"),
    ],
)
def test_bad_action_of_one_environment(micro_pipeline_folder: Path, action: np.ndarray, message: str) -> None:
    env = ddpo_env.DenoisingEnv(model=micro_pipeline_folder, prompts=PROMPTS)
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(action)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a cat"}, r"reset options must be among prompts, latents, reset_mask; got 'prompt'"),
        (
            {"prompts": ["a cat"]},
            r"options\['prompts'\] must be a string or one per sub-environment \(2\); got \['a cat'\]",
        ),
        ({"prompts": []}, r"options\['prompts'\] must be a string or one per sub-environment \(2\); got \[\]"),
        ({"prompts": 5}, r"options\['prompts'\] must be a string or one per sub-environment \(2\); got 5"),
        ({"prompts": ["a cat", ""]}, r"options\['prompts'\].*must not be empty"),
        ({"prompts": ["a cat", 5]}, r"options\['prompts'\].*must be a string.*5"),
        ({"latents": np.zeros((4, 8, 9))}, r"options\['latents'\] must have shape \(4, 8, 8\) or \(2, 4, 8, 8\); got"),
        ({"latents": zeros(3)}, r"options\['latents'\] must have shape.*got \(3, 4, 8, 8\)"),
        ({"latents": np.full(SHAPE, np.nan)}, r"options\['latents'\] must be finite; got NaN"),
        ({"latents": "noise"}, r"options\['latents'\] must be an array or a tensor of real numbers; got 'noise'"),
        ({"reset_mask": [True, False]}, r"options\['reset_mask'\] must be a boolean array of shape \(2,\)"),
        ({"reset_mask": np.array([1, 0])}, r"options\['reset_mask'\] must be a boolean array of shape \(2,\)"),
        ({"reset_mask": np.zeros(2, bool)}, r"options\['reset_mask'\] must select at least one sub-environment"),
    ],
)
def test_bad_reset_options_are_refused_and_change_nothing(
    make_vec: MakeVec, options: dict[str, Any], message: str
) -> None:
    env = make_vec()
    before, _ = env.reset(seed=0)
    generators = env.np_random
    with pytest.raises(ValueError, match=message):
        env.reset(seed=1, options=options)
    after = env.observe()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert env.np_random == generators


def test_a_mask_that_splits_a_group_is_refused(make_vec: MakeVec) -> None:
    env = make_vec(4, samples_per_prompt=2)
    with pytest.raises(ValueError, match="whole groups of samples_per_prompt=2"):
        env.reset(options={"reset_mask": np.array([True, False, False, False])})


@pytest.mark.parametrize("seed", [[1], [1, 2, 3], 1.5])
def test_bad_seed_is_refused(make_vec: MakeVec, seed: Any) -> None:
    with pytest.raises(
        ValueError, match=r"seed must be None, an integer of at least 0, or one per sub-environment \(2\); got"
    ):
        make_vec().reset(seed=seed)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ([1.0], ValueError, r"reward judge must return shape \(2,\).*\(1,\)"),
        ([[1.0], [2.0]], ValueError, r"reward judge must return shape \(2,\).*\(2, 1\)"),
        ([1.0, np.nan], ValueError, "reward judge must be finite; got nan for prompt 'an ant'"),
        (np.array([np.inf, 0]), ValueError, "reward judge must be finite; got inf for prompt 'a cat'"),
        (None, TypeError, "reward judge must return scores; got None"),
        (["good", "bad"], TypeError, "reward judge must return one number per sample"),
    ],
)
def test_a_reward_that_answers_wrongly(make_vec: MakeVec, answer: Any, error: type[Exception], message: str) -> None:
    def judge(images: Any, prompts: Any, metadata: Any) -> Any:
        return answer

    env = make_vec(reward=judge)
    env.reset(options={"prompts": PROMPTS})
    env.step(zeros())
    with pytest.raises(error, match=message):
        env.step(zeros())


@pytest.mark.parametrize("scores", [[1, 2, 3, 4], np.array([1, 2, 3, 4], np.uint8), torch.tensor([1, 2, 3, 4])])
def test_integer_rewards_stay_distinct(make_vec: MakeVec, scores: Any) -> None:
    env = make_vec(4, reward=lambda *_: scores)
    env.reset()
    env.step(zeros(4))
    rewards = env.step(zeros(4))[1]
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert len(set((rewards - rewards.mean()) / rewards.std())) == 4


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_a_rewards_own_error_passes_through_and_the_step_can_be_repeated(make_vec: MakeVec, mode: str) -> None:
    failures = [ConnectionError("the judge is away")]

    def judge(images: np.ndarray, prompts: Any, metadata: Any) -> Any:
        if failures:
            raise failures.pop()
        return [7.0] * len(images)

    env = make_vec(reward=judge, autoreset_mode=mode)
    env.reset(seed=0)
    before = env.step(zeros())[0]
    with pytest.raises(ConnectionError, match="the judge is away"):
        env.step(zeros() + 1)
    assert all(np.array_equal(before[name], env.observe()[name]) for name in before)
    _, rewards, terminations, _, _ = env.step(zeros() + 1)
    assert rewards.tolist() == [7.0, 7.0]
    assert terminations.all()
