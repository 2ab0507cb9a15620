"""A setting that has no effect with the others is refused, and the table of such settings is what the code reads."""

import inspect
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import yaml

from agents import AWM
from agents.algorithms.options import UpdateOptions
from agents.algorithms.policy_gradient.trust_region import surrogate
from agents.config.algorithms import ALGORITHMS, WITHOUT_EFFECT
from agents.config.command_line import parse_command_line
from agents.config.presets import preset_config
from agents.config.reproduction import reproducing_flags
from agents.config.resolve import resolve, unused_settings
from agents.config.settings import Schedule, TrainingSettings
from agents.config.train_config import TrainConfig, train_config
from agents.distributed import Processes
from agents.policy.abilities import PolicyEvaluation, StepMove
from agents.training import build

SIZES = {
    *("samples_per_prompt", "shared_noise", "sample_batch_size", "train_batch_size"),
    *("updates_per_iteration", "epochs"),
}
"""Of an iteration, whatever the algorithm is."""


def arguments_of(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """The class that a run makes, and its arguments."""
    monkeypatch.setattr(build, "resolve_name", lambda name: lambda *_, **named: (name, named))
    env: Any = SimpleNamespace(num_envs=config.training.sample_batch_size, denoising_env=None)
    kind, named = build.build_algorithm(config, env, Processes())  # type: ignore[misc]
    return kind, {name: value for name, value in named.items() if name not in ("learning_rate", "processes")}


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    other: dict[Any, Any] = {"clip": "guard", "raise": "drop", "per_prompt": "batch", "group": "global_std"}
    return value + 1 if isinstance(value, int | float) else other[value]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_table_is_what_a_run_gives_to_its_algorithm(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = "aesthetic" if algorithm == "draft" else "jpeg_compressibility"
    config = train_config(algorithm=algorithm, reward=reward, trust_region="clip").resolved()
    before = arguments_of(config, monkeypatch)
    assert before == arguments_of(config.changed(run_dir="elsewhere"), monkeypatch)
    for field in fields(TrainingSettings):
        if field.name in SIZES:
            continue
        value = getattr(config.training, field.name)
        other = replace(config, training=replace(config.training, **{field.name: changed(value)}))
        has_effect = arguments_of(other, monkeypatch) != before
        if field.name in ("trust_region", "divergence_limit"):  # a rule of its own; of the class alone, see below
            assert has_effect == (algorithm in ("ppo", "grpo"))
        else:
            assert has_effect == (field.name not in unused_settings(config)), field.name


@pytest.mark.parametrize("kind", ["clip", "guard", "dppo"])
def test_table_is_what_a_trust_region_reads(kind: Any) -> None:
    ones = torch.ones(2)
    move = None if kind == "clip" else StepMove(ones, ones, ones)
    policy = PolicyEvaluation(ones, ones, 0.5 * ones, ones, None, move)

    def objective(clip_range: float, limit: float) -> list[float]:
        value: list[float] = surrogate(kind, policy, ones, clip_range, limit)[0].tolist()
        return value

    unused = unused_settings(train_config(trust_region=kind))
    assert ("clip_range" in unused) == (objective(0.1, 0.1) == objective(0.2, 0.1))
    assert ("divergence_limit" in unused) == (objective(0.1, 0.1) == objective(0.1, 2.0))


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_table_is_what_a_schedule_reads(schedule: str) -> None:
    config = train_config(learning_rate_schedule=schedule, iterations=9).resolved()
    rates = []
    for length in (3, 9):
        rate = build._learning_rate(config.changed(schedule_iterations=length))
        rates.append([rate(remaining) if callable(rate) else rate for remaining in (1.0, 0.2, 0.0)])
    assert ("schedule_iterations" in unused_settings(config)) == (rates[0] == rates[1])


def test_table_has_settings_and_their_values() -> None:
    known = TrainConfig().flat()
    for name, deciding in WITHOUT_EFFECT.items():
        assert name in known
        for decider, values in deciding.items():
            for value in values:
                train_config(**{decider: value})
    assert UpdateOptions(noise_window_stride=3).noise_window_at(5, 10) is None


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"nft_beta": 0.1}, "with ppo"),
        ({"algorithm": "nft", "dpo_beta": 50.0}, "with nft"),
        ({"algorithm": "rwr_sparse", "rwr_per_prompt": True}, "with rwr_sparse"),
        ({"algorithm": "awm", "draft_steps": 2}, "with awm"),
        ({"algorithm": "nft", "clip_range": 0.1}, "with nft"),
        ({"algorithm": "rwr", "timestep_fraction": 0.2}, "with rwr"),
        ({"algorithm": "rwr", "timestep_window": (0.0, 0.5)}, "with rwr"),
        ({"algorithm": "rwr_sparse", "kl_coef": 0.0, "timestep_window": (0.0, 0.5)}, "with rwr_sparse"),
        ({"preset": "sd14-aesthetic", "algorithm": "rwr", "timestep_window": (0.0, 0.5)}, "with rwr"),
        ({"algorithm": "nft", "recompute_log_probs": True}, "with nft"),
        ({"algorithm": "awm", "recompute_log_probs": True}, "with awm"),
        ({"algorithm": "dpo", "recompute_log_probs": True}, "with dpo"),
        ({"algorithm": "draft", "reward": "aesthetic", "recompute_log_probs": True}, "with draft"),
        ({"algorithm": "draft", "reward": "aesthetic", "advantage": "batch"}, "with draft"),
        ({"trust_region": "clip", "divergence_limit": 1.0}, "with trust_region clip"),
        ({"trust_region": "dppo", "clip_range": 0.1}, "with trust_region dppo"),
        ({"advantage": "batch", "stat_min_count": 4}, "with advantage batch"),
        ({"algorithm": "grpo", "stat_buffer_size": 64}, "with advantage group"),
        ({"advantage": "dr_grpo", "advantage_clip": 2.0}, "with advantage dr_grpo"),
        ({"noise_window_stride": 2}, "without noise_window"),
        ({"preset": "sd14-aesthetic", "algorithm": "nft", "clip_range": 2e-4}, "with nft"),
        ({"learning_rate_schedule": "constant", "schedule_iterations": 1}, "with learning_rate_schedule constant"),
        ({"algorithm": "reinforce", "target_kl": 1e-9}, "with reinforce"),
        ({"lora_rank": 0, "lora_targets": "attention"}, "with lora_rank 0"),
    ],
)
def test_setting_without_an_effect_is_refused(settings: dict[str, Any], where: str) -> None:
    name = [*settings][-1]
    with pytest.raises(ValueError, match=f"^{name} must not be given {where}, where it has no effect; got"):
        resolve(train_config(**settings))


def test_error_does_not_say_of_an_argument_of_the_class_that_it_has_no_effect() -> None:
    message = "clip_range must not be given with awm, whose class has another clip_range, which is 1.0 .*; got 0.1"
    with pytest.raises(ValueError, match=message):
        resolve(train_config(algorithm="awm", clip_range=0.1))
    assert inspect.signature(AWM).parameters["clip_range"].default == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "nft", "clip_range": 3e-3, "dpo_beta": 2000.0},
        {"algorithm": "nft", "advantage": "leave_one_out", "advantage_clip": 2.0},
        {"algorithm": "draft", "reward": "aesthetic", "advantage": "per_prompt"},
        {"trust_region": "guard", "clip_range": 0.1},
        {"noise_window": 2, "noise_window_stride": 2},
        {"algorithm": "rwr", "timestep_window": (0.0, 0.5), "kl_coef": 0.1},
        {"algorithm": "rwr", "timestep_window": (0.0, 0.5), "noise_window": 2},
        {"algorithm": "rwr_sparse", "timestep_window": (0.0, 0.5), "target_kl": 1.0},
        {"algorithm": "nft", "recompute_log_probs": True, "target_kl": 1.0},
        {"learning_rate_schedule": "constant", "iterations": 3, "schedule_iterations": 3},
        {"learning_rate_schedule": "cosine", "schedule_iterations": 1},
        {"learning_rate_schedule": "constant"},
        {"lora_rank": 1, "lora_targets": "attention"},
    ],
)
def test_defaults_and_settings_with_an_effect_are_taken(settings: dict[str, Any]) -> None:
    resolved = resolve(train_config(**settings))
    assert resolve(resolved).flat() == resolved.flat()


def test_what_was_filled_in_is_no_wish_of_the_user() -> None:
    resolved = resolve(train_config(learning_rate_schedule="constant", iterations=3))
    assert resolve(resolved.changed(iterations=5)).iterations == 5


def test_what_a_preset_or_a_file_says_is_no_wish_of_the_user(tmp_path: Path) -> None:
    line = parse_command_line(["--preset", "sd14-aesthetic", "--algorithm", "nft"]).config
    assert resolve(line).training.clip_range == preset_config("sd14-aesthetic").training.clip_range
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(resolve(train_config(clip_range=0.1)).as_dict()))
    config = resolve(parse_command_line(["--config", str(file), "--algorithm", "nft"]).config)
    assert config.training.clip_range == 0.1
    assert "--clip-range" not in reproducing_flags(config), "that command would be refused"
    with pytest.raises(ValueError, match="clip_range must not be given with nft"):
        resolve(parse_command_line(["--config", str(file), "--algorithm=nft", "--clip-range=0.1"]).config)
