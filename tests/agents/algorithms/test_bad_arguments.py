"""Absurd constructor arguments are refused at once, by an error with the name, the value and what is valid."""

import math

import pytest
import torch
from helpers.algorithms import MAKERS
from helpers.micro_agents import STEPS

from agents.algorithms.advantages import (
    BatchAdvantage,
    DecoupledAdvantage,
    GeneralizedAdvantage,
    GroupRelativeAdvantage,
    LeaveOneOutAdvantage,
    PerPromptAdvantage,
)
from agents.algorithms.forward.awm import AWM
from agents.algorithms.forward.dpo import DPO
from agents.algorithms.forward.nft import NFT
from agents.algorithms.options import check_timesteps
from agents.algorithms.policy_gradient.ppo import PPO
from agents.algorithms.policy_gradient.reinforce import REINFORCE
from agents.algorithms.rwr import RWR
from agents.policy.options import PolicyOptions

NUMBER = [math.nan, math.inf, -1.0, "1", None, True]
EVERY_ALGORITHM = {
    "n_steps": [0, -1, 1.5, 10**12, "8", True],
    "learning_rate": [math.nan, math.inf, -1e-3, 1e39, "fast", None, True],
    "gamma": [*NUMBER, 2],
    "gae_lambda": [*NUMBER, 2],
    "vf_coef": [*NUMBER, 1e12],
    "max_grad_norm": [*NUMBER, 0],
    "seed": [-1, 2**32, 1.5, "0", True],
    "device": ["gpu", "", "cuda:x", "cuda:99", "mps:x", 1.5],
    "stats_window_size": [0, -1, 1.5, None],
    "verbose": [3, -1, "yes"],
    "target_kl": [math.nan, math.inf, 0, -1.0],
    "kl_coef": [math.nan, math.inf, -1.0, 1e12],
    "timestep_fraction": [math.nan, 0, 1.5],
    "timestep_window": [(0.5, 0.5), (0.9, 0.1), (0, math.nan), (0,), 3],
    "ema_decay": [math.nan, 1.0, -0.1],
    "micro_batch_size": [0, -1, 1.5, 10**12],
    "non_finite_rewards": ["ignore", None, 1],
}
OWN = {
    PPO: {
        "clip_range": [math.nan, math.inf, 0, -0.1, "0.2", None],
        "clip_range_vf": [math.nan, math.inf, 0, -0.1, "0.2"],
        "normalize_advantage": [1, "yes"],
        "trust_region": ["kl", None],
        "divergence_limit": [*NUMBER, 0],
        "batch_size": [0, -1, 2.5, 10**12],
        "n_epochs": [0, 1e12, 10**12, 1.5, None],
        "ent_coef": [*NUMBER, 1e12],
    },
    REINFORCE: {"ent_coef": [*NUMBER, 1e12]},
    RWR: {
        "beta": [*NUMBER, 0, 1e12],
        "percentile": [math.nan, 100, -1],
        "weighting": ["linear"],
        "n_epochs": [0, 10**12],
    },
    AWM: {
        "clip_range": [*NUMBER, 0],
        "advantage_clip": [*NUMBER, 0],
        "power": [*NUMBER, 0, 2],
        "lag_coef": [*NUMBER, 1e12],
        "lag_rate": [*NUMBER, 2],
        "lag_limit": [*NUMBER, 1],
    },
    DPO: {"beta": [*NUMBER, 0, 1e12], "n_epochs": [0]},
    NFT: {
        "beta": [*NUMBER, 0, 1e12],
        "advantage_clip": [*NUMBER, 0],
        "lag_rate": [*NUMBER, 2],
        "lag_limit": [*NUMBER, 1],
        "n_epochs": [0, 10**12],
    },
}
CASES = [
    (kind, name, value)
    for kind, own in OWN.items()
    for name, values in {**EVERY_ALGORITHM, **own}.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_argument_of_an_algorithm(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name}(\[\d\])? must be .*; got "):
        kind("MlpPolicy", "CartPole-v1", **{"n_steps": 8, "device": "cpu", name: value})


@pytest.mark.parametrize(
    ("kind", "name", "only", "value"),
    [(REINFORCE, "batch_size", None, 4), (REINFORCE, "n_epochs", 1, 2), (RWR, "ent_coef", 0.0, 0.1)],
)
def test_argument_that_an_algorithm_fixes_has_that_value_only(kind, name, only, value):
    with pytest.raises(ValueError, match=rf"^{name} must be {only} with {kind.__name__}, .+; got {value}$"):
        kind("MlpPolicy", "CartPole-v1", n_steps=8, device="cpu", **{name: value})
    assert getattr(kind("MlpPolicy", "CartPole-v1", n_steps=8, device="cpu", **{name: only}), name) == only


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device")
def test_device_that_the_machine_does_not_have():
    with pytest.raises(ValueError, match="^device must be auto or one of cpu.* on this machine; got 'mps'"):
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, device="mps")


def test_schedule_that_leaves_the_valid_range_is_told():
    for bad in (math.nan, -1.0, 1e39):
        model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
        model.lr_schedule = lambda remaining, bad=bad: bad
        with pytest.raises(ValueError, match="learning_rate must be .* at any progress; got"):
            model.learn(8)
    model = PPO(
        "MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", clip_range=lambda remaining: math.nan
    )
    with pytest.raises(ValueError, match="clip_range must be .* at any progress; got nan"):
        model.learn(8)


def test_batch_size_that_does_not_divide_the_rollout_is_told():
    with pytest.warns(UserWarning, match="batch_size=6 does not divide the 8 steps"):
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=6, device="cpu")


@pytest.mark.parametrize("name", MAKERS)
def test_window_without_a_step_of_the_sampler_is_refused_at_once(name, micro_pipeline_folder):
    message = rf"timestep_window must contain at least one of the {STEPS} steps; got \(0.0, 0.05\)"
    with pytest.raises(ValueError, match=message):
        MAKERS[name](micro_pipeline_folder, timestep_window=(0.0, 0.05))


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        (PerPromptAdvantage, [None]),
        (BatchAdvantage, [None]),
        (LeaveOneOutAdvantage, [None]),
        (GroupRelativeAdvantage, []),  # whose default depends on the scale
    ],
)
def test_clip_of_an_estimator(kind, absent):
    for clip in [0, -1.0, math.nan, "5", *absent]:
        with pytest.raises(ValueError, match="clip must be .*; got "):
            kind(clip=clip)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (PerPromptAdvantage, {"buffer_size": 10**12}),
        (PerPromptAdvantage, {"buffer_size": 2.5}),
        (PerPromptAdvantage, {"min_count": 1}),
        (GroupRelativeAdvantage, {"scale": True}),
        (DecoupledAdvantage, {"weights": {}}),
        (DecoupledAdvantage, {"weights": "aesthetic:1"}),
        (GeneralizedAdvantage, {"normalize": "no"}),
    ],
)
def test_other_arguments_of_an_estimator(kind, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be .*; got "):
        kind(**arguments)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("guidance_scale", [math.nan, math.inf, -1.0, 1e9]),
        ("eta", [math.nan, math.inf, -1, 1e9, "1"]),
        ("noise_level", [math.nan, math.inf, -1, 1e9, "1"]),
        ("min_std", [math.nan, math.inf, 0, 1e9]),
        ("lora_rank", [-1, 1.5, 10**12]),
        ("log_prob_reduction", ["max"]),
        ("critic", [1, "no"]),
    ],
)
def test_option_of_the_policy(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be .*; got "):
            PolicyOptions(**{name: value})


def test_weight_of_a_reward():
    with pytest.raises(ValueError, match=r"weights\['a'\] must be .*; got nan"):
        DecoupledAdvantage({"a": math.nan})


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 1.5, "10", None, True, 1e39])
def test_learn_refuses_what_is_no_number_of_timesteps(value):
    with pytest.raises((ValueError, TypeError), match="total_timesteps must be"):
        check_timesteps(value)


@pytest.mark.parametrize("value", [0, 100, 1e5])
def test_learn_takes_numbers_of_timesteps_as_stable_baselines3_does(value):
    assert check_timesteps(value) is None
