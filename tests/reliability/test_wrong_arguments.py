"""Wrong arguments of the public classes and functions: each is a clear error that names the parameter."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.micro_agents import brightness, micro_env
from helpers.wrong_values import settings_of, shown, unclear, wrong_values

import agents
import rewards
from agents import DiffusionPolicy, VectorEnvAdapter
from agents.policy.options import PolicyOptions
from ddpo_env import DenoisingEnv, DenoisingVectorEnv, load_model
from ddpo_env.models import loading
from ddpo_env.prompts import load_prompts

NAN, INF = float("nan"), float("inf")
COUNT = (0, -1, 1.5, 2.0, "2", None, True, NAN, INF, [2], 10**12)
OBJECT = (5, 0.5, object(), [1], {"a": 1})


async def later(images: Any, prompts: Any, metadata: Any) -> list[float]:
    return [0.0] * len(images)


def one_by_one(images: Any, prompts: Any, metadata: Any) -> Any:
    yield 0.0


class NotMade:
    def __init__(self, needed: int) -> None: ...

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> list[float]:
        return [0.0] * len(images)


BEFORE_LOADING: dict[str, tuple[Any, ...]] = {
    "num_envs": COUNT,
    "num_inference_steps": COUNT,
    "samples_per_prompt": COUNT,
    "reward": ("", "nonsense", "no.such:reward", "os:", ":f", "jpeg_compressibility:nan", *OBJECT, None,
               lambda: 0, lambda images: 0, later, one_by_one, NotMade, "builtins:print(1)", "aesthetic:1e400"),
    "reward_options": (5, "text", [1], {"nothing": 1}, {1: 2}),
    "prompts": ("", "nonsense", [], [""], ["a cat", 5], ["a cat", None], 5, None, {"a": 1}, [("a cat", 5)], ["\0"],
                np.array([1, 2]), np.array([["a"], ["b"]]), pd.Series([1, 2]), ["x" * 10**6], Path("missing.txt"),
                lambda a, b, c: "a cat", lambda generator, second: "a cat", torch.zeros(2), b"a cat",
                [b"a cat"], [["a cat"]]),
    "backend": ("jax", "", None, 5, True),
    "autoreset_mode": ("next", "", None, 5, True),
    "part": (5, (), (0,), (1, 1), (-1, 2), (0, 0), (0, 1, 2), ("0", "1"), None, (0.0, 1), (True, 2), "01"),
    "deferred_rewards": ("yes", 1, None, 0.5),
    "non_finite_rewards": ("drop", "", None, 5, True),
    "render_mode": ("human", "", 5, True),
    "model": ("", "nonsense", "no/such/folder/here", "/no/such", *OBJECT, None, Path("missing"), torch.nn.Linear(1, 1)),
    "device": ("", "tpu", "cuda:99", None, 5, "meta"),
    "dtype": ("", "float8", None, 5, torch.float64, "int8"),
    "resolution": (0, -8, 7, 65, 1.5, "64", "64x7", "64x", (64, 64), True, NAN, 10**12, [64]),
}  # fmt: skip


def named(case: Any) -> str:
    return shown(case)


def lacking(call: Callable[[], Any], name: str, value: Any) -> str | None:
    """Return what the error of a call lacks to be clear; a call that passes lacks the error."""
    try:
        call()
    except (ValueError, TypeError) as error:
        lacks = unclear(str(error), name, value)
        return f"{lacks}: {error}" if lacks else None
    return "an error"


def pairs(table: dict[str, tuple[Any, ...]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "_loaded", {})
    monkeypatch.setattr(loading, "load_pipeline", load)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("name", "value"), pairs(BEFORE_LOADING), ids=named)
def test_environment_refuses_before_it_loads(name: str, value: Any) -> None:
    if name == "resolution":
        pytest.skip("a pipeline's own sizes are known from its configuration files: the next test")
    assert lacking(lambda: DenoisingVectorEnv(**{name: value}), name, value) is None


@pytest.mark.parametrize("value", BEFORE_LOADING["resolution"], ids=named)
def test_environment_refuses_a_resolution(micro_pipeline_folder: Path, value: Any) -> None:
    assert (
        lacking(lambda: DenoisingVectorEnv(model=str(micro_pipeline_folder), resolution=value), "resolution", value)
        is None
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["num_env", "rewards", "steps", "modell"])
def test_single_environment_refuses_unknown_arguments(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        DenoisingEnv(**{name: 1})


LATENT = (4, 8, 8)
RESET_OPTIONS: list[tuple[str, Any]] = [
    ("options", {"latent": 1}),
    ("options", 5),
    ("options", [("prompts", "a cat")]),
    ("prompts", {"prompts": 5}),
    ("prompts", {"prompts": ["a cat"]}),
    ("prompts", {"prompts": ["a cat", ""]}),
    ("prompts", {"prompts": ["a cat", None]}),
    ("prompts", {"prompts": [["a", "b"], ["c", "d"]]}),
    ("prompts", {"prompts": ""}),
    ("prompts", {"prompts": b"a cat"}),
    ("latents", {"latents": "noise"}),
    ("latents", {"latents": np.zeros((3, *LATENT))}),
    ("latents", {"latents": np.zeros((4, 8))}),
    ("latents", {"latents": np.full(LATENT, NAN)}),
    ("latents", {"latents": np.full(LATENT, 1e39)}),
    ("latents", {"latents": np.zeros(LATENT, complex)}),
    ("latents", {"latents": np.zeros(LATENT, object)}),
    ("latents", {"latents": [[1], [1, 2]]}),
    ("latents", {"latents": object()}),
    ("reset_mask", {"reset_mask": np.ones(3, bool)}),
    ("reset_mask", {"reset_mask": np.zeros(2, bool)}),
    ("reset_mask", {"reset_mask": [True, False]}),
    ("reset_mask", {"reset_mask": np.ones(2, int)}),
    ("reset_mask", {"reset_mask": "all"}),
]
SEEDS: tuple[Any, ...] = ("0", 1.5, -1, [0], [0, -1], [0, "1"], [0, 1.5], True, [True, False], NAN, object())
ACTIONS: tuple[Any, ...] = (
    None,
    "noise",
    np.zeros(LATENT),
    np.zeros((2, 4, 8)),
    np.zeros((3, *LATENT)),
    np.full((2, *LATENT), NAN, np.float32),
    np.full((2, *LATENT), INF, np.float32),
    np.full((2, *LATENT), 1e39),
    np.zeros((2, *LATENT), complex),
    np.zeros((2, *LATENT), object),
    torch.zeros((2, *LATENT), dtype=torch.complex64),
    [[1], [1, 2]],
    object(),
)


@pytest.fixture
def env(micro_pipeline_folder: Path) -> DenoisingVectorEnv:
    return micro_env(str(micro_pipeline_folder), 2, backend="numpy", num_inference_steps=2)


@pytest.mark.parametrize(("name", "options"), RESET_OPTIONS, ids=named)
def test_reset_refuses_options(env: DenoisingVectorEnv, name: str, options: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        env.reset(seed=0, options=options)
    assert name in str(caught.value)
    assert "must" in str(caught.value)
    env.reset(seed=0)  # nothing was changed by half


@pytest.mark.parametrize("seed", SEEDS, ids=named)
def test_reset_refuses_seeds(env: DenoisingVectorEnv, seed: Any) -> None:
    assert lacking(lambda: env.reset(seed=seed), "seed", seed) is None


@pytest.mark.parametrize("action", ACTIONS, ids=range(len(ACTIONS)))
def test_step_refuses_actions(env: DenoisingVectorEnv, action: Any) -> None:
    env.reset(seed=0)
    with pytest.raises((ValueError, TypeError), match="action.* must"):
        env.step(action)
    env.step(np.zeros((2, *LATENT), np.float32))


POLICY = [(name, value) for name, hint in settings_of(PolicyOptions).items() for value in wrong_values(hint)]
DEFAULTS = (("guidance_scale", None), ("lora_rank", None))
"""The policy takes them: what its model can have."""


@pytest.mark.parametrize(("name", "value"), [wrong for wrong in POLICY if wrong not in DEFAULTS], ids=named)
def test_policy_refuses_options(env: DenoisingVectorEnv, name: str, value: Any) -> None:
    def make() -> DiffusionPolicy:
        spaces = env.single_observation_space, env.single_action_space
        return DiffusionPolicy(*spaces, lambda _: 1e-3, **{name: value})

    assert lacking(make, name, value) is None


ALGORITHM_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "learning_rate": (-1.0, NAN, INF, "fast", None, 1e39, True),
    "n_steps": tuple(value for value in COUNT if value is not None),
    "batch_size": (0, -1, 1.5, "2", NAN, 10**12, True),
    "n_epochs": (0, -1, 1.5, "2", NAN, INF, 10**12, None, True),
    "clip_range": (0.0, -0.1, NAN, INF, "wide", None),
    "gamma": (-0.1, 1.1, NAN, "1", None),
    "gae_lambda": (-0.1, 1.1, NAN, "1", None),
    "max_grad_norm": (0.0, -1.0, NAN, "1"),
    "micro_batch_size": (0, -1, 1.5, "2", True),
    "target_kl": (0.0, -1.0, NAN, "1"),
    "kl_coef": (-1.0, NAN, INF, "1", None),
    "ema_decay": (-0.1, 1.0, NAN, "1", None),
    "non_finite_rewards": ("keep", "", None, 5),
    "advantage": (5, "group", object()),
    "seed": (-1, 2**32, 1.5, "0", True),
    "device": ("tpu9", 5),
}


@pytest.mark.parametrize(("name", "value"), pairs(ALGORITHM_ARGUMENTS), ids=named)
def test_algorithm_refuses_arguments(micro_pipeline_folder: Path, name: str, value: Any) -> None:
    env = VectorEnvAdapter(micro_env(str(micro_pipeline_folder), 2, num_inference_steps=2))
    given = {"n_steps": 2, "batch_size": 4, "policy_kwargs": {"guidance_scale": 1.0}}
    assert lacking(lambda: agents.PPO(DiffusionPolicy, env, **given | {name: value}), name, value) is None


ESTIMATORS: list[tuple[Callable[..., Any], str, Any]] = [
    *((agents.PerPromptAdvantage, "clip", value) for value in (0.0, -1.0, NAN, "5", None)),
    *((agents.PerPromptAdvantage, "min_count", value) for value in (1, 0, 1.5, "8", 64, True)),
    *((agents.PerPromptAdvantage, "buffer_size", value) for value in (0, -1, 1.5, "8")),
    *((agents.BatchAdvantage, "clip", value) for value in (0.0, -1.0, NAN, "5", None)),
    *((agents.GroupRelativeAdvantage, "clip", value) for value in (0.0, -1.0, NAN, "5")),
    *((rewards.load_reward, "spec", value) for value in ("", 5, None, "a b", "x:y:z")),
    *((load_model, "model", value) for value in (None, 5, "", "nonsense")),
    *((load_prompts, "prompts", value) for value in (None, 5, "", "nonsense", [])),
]


@pytest.mark.parametrize(("make", "name", "value"), ESTIMATORS, ids=named)
def test_classes_and_functions_refuse_arguments(make: Callable[..., Any], name: str, value: Any) -> None:
    is_positional = make in (rewards.load_reward, load_model, load_prompts)
    call = (lambda: make(value)) if is_positional else (lambda: make(**{name: value}))
    assert lacking(call, "reward" if name == "spec" else name, value) is None


ANSWERS: list[Any] = [
    None,
    "scores",
    ["a", "b"],
    [1.0],
    [1.0, 2.0, 3.0],
    [[1.0], [2.0]],
    [1.0, None],
    [NAN, 1.0],
    [INF, 1.0],
    [1e39, 1.0],
    [1j, 2.0],
    5.0,
    np.zeros((2, 1)),
    np.array(["1", "2"]),
    np.array([1j, 2]),
    {"a": 1},
    object(),
    ([1.0, 2.0], {"detail": [1]}),
    ([1.0, 2.0], {"detail": "ab"}),
    ([1.0, 2.0], {"detail": 5}),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_environment_refuses_answers_of_a_reward(micro_pipeline_folder: Path, answer: Any) -> None:
    def odd(images: Any, prompts: Any, metadata: Any) -> Any:
        return answer

    env = micro_env(str(micro_pipeline_folder), 2, backend="numpy", num_inference_steps=1, reward=odd)
    env.reset(seed=0)
    with pytest.raises((ValueError, TypeError), match=r"reward odd.* must"):
        env.step(np.zeros((2, *LATENT), np.float32))


@dataclass
class Odd:
    """A reward with an attribute that a runtime-checkable protocol could take for a method."""

    state_dict: int = 3

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> Any:
        return brightness(images, prompts, metadata)


def test_gymnasium_says_what_max_episode_steps_would_do() -> None:
    with pytest.raises((ValueError, TypeError, gym.error.Error), match="max_episode_steps"):
        gym.make_vec("ddpo_env:DDPO-SD-v0", num_envs=2, num_inference_steps=2, max_episode_steps=1)
