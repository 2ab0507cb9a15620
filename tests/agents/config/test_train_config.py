"""Settings by name: where they go, what is refused, and files."""

import dataclasses
import re

import pytest
import yaml

from agents import TrainConfig, train_config
from agents.config.command_line import parse_command_line
from agents.config.presets import preset_config
from ddpo_env.models import resolve_source
from ddpo_env.prompts import load_prompts
from rewards import load_reward


def test_settings_find_their_group_by_name():
    config = train_config(model="x", lora_rank=2, kl_coef=0.5, epochs=3, adam_beta1=0.5, eval_samples=7)
    assert (config.model, config.policy.lora_rank, config.update.kl_coef) == ("x", 2, 0.5)
    assert (config.training.epochs, config.optimizer.adam_beta1, config.run.eval_samples) == (3, 0.5, 7)
    assert config.policy.lora_targets == TrainConfig().policy.lora_targets, "the others keep their defaults"


def test_names_of_settings_are_unique():
    config = TrainConfig()
    names = [field.name for field in dataclasses.fields(config)]
    for group in (config.policy, config.update, config.training, config.optimizer, config.run):
        names += [field.name for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_a_configuration_cannot_be_changed_in_place():
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = "x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.policy.lora_rank = 1
    assert config.changed(lora_rank=1).policy.lora_rank == 1
    assert config.policy.lora_rank == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rnk": 2}, "there is no setting 'lora_rnk'; did you mean lora_rank?"),
        ({"colour": "blue"}, "there is no setting 'colour'"),
        ({"seed": "0"}, "seed must be an integer; got '0'"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing must be True or False; got 'no'"),
        (
            {"reward_options": {"model": "tiny"}},
            r"reward_options must be .* key=value, such as \['model=tiny'\]; got {'",
        ),
        ({"pipeline_arguments": "a=1"}, r"pipeline_arguments must be .* such as \['num_frames=17'\]; got 'a=1'"),
        ({"reward": len}, "reward must be text: .* such as 'my_module:function', .*; got <built-in function len>"),
        ({"holdout_reward": len}, "holdout_reward must be text: .*'my_module:function'"),
        ({"timestep_window": [0, 0.5, 1]}, "timestep_window must be a tuple of 2 values"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        train_config(**settings)


def test_list_will_do_for_a_tuple():
    lists = {"reward_options": ["quality=90"], "timestep_window": [0, 0.5], "eta": [1.0, 0.0]}
    config = train_config(**lists)
    assert config == train_config(**{name: tuple(value) for name, value in lists.items()})
    assert hash(config.update) == hash(train_config(timestep_window=(0, 0.5)).update)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        (lambda: train_config(algorithm="gropo"), "grpo"),
        (lambda: train_config(sampler="flowsde"), "flow-sde"),
        (lambda: preset_config("sd14-asthetic"), "sd14-aesthetic"),
        (lambda: load_prompts("simple_animal"), "simple_animals"),
        (lambda: resolve_source("tinny"), "tiny"),
        (lambda: load_reward("asthetic"), "aesthetic"),
        (lambda: load_reward("jpeg_compresibility:1,clip_score:1"), "jpeg_compressibility"),
        (lambda: load_reward("clip_score", modl="tiny"), "model"),
        (lambda: load_reward("nothing_like_it"), None),
    ],
)
def test_nearest_name_is_suggested(wrong, meant):
    with pytest.raises(ValueError, match="must be") as error:
        wrong()
    assert str(error.value).partition("; did you mean ")[2] == (f"{meant}?" if meant else "")


def test_file_gives_the_same_configuration(tmp_path):
    config = train_config(run_dir=tmp_path, reward_options=("a=1",), timestep_window=(0.1, 0.7)).resolved()
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.as_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": {"keep_checkpoint": 2}}, "there is no setting 'keep_checkpoint'"),
        ({"samplesperiteration": 8}, "there is no setting 'samplesperiteration'; did you mean samples_per_iteration?"),
        ({"trainings": {"epochs": 2}}, "there is no group of settings 'trainings'; did you mean training?"),
        ({"seed": {"epochs": 2}}, "seed must be a setting and no group of them; got"),
        ({"update": 3}, "update must be a group of settings; got 3"),
    ],
)
def test_name_in_a_file_that_does_not_exist_is_refused_with_the_nearest(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig.from_dict(TrainConfig().as_dict() | values)


@pytest.mark.parametrize("values", [None, "text", [], {}, {"run": {}}, {"run": {"colour": 1}}])
def test_other_files_are_refused(values):
    with pytest.raises(ValueError, match="no settings of a run"):
        TrainConfig.from_dict(values)


def test_resolving_fills_every_gap_once():
    config = train_config(algorithm="rwr", samples_per_iteration=40).resolved()
    assert (config.iterations, config.learning_rate, config.training.epochs) == (12, 2e-3, 5)
    assert (config.training.sample_batch_size, config.training.samples_per_prompt) == (40, 8)
    assert config.training.advantage == "per_prompt"
    assert config.resolved() == config


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_samples": 10**12},
        {"seed": 2**32},
        {"samples_per_iteration": 10**9},
        {"iterations": 10**12},
        {"num_inference_steps": 10**9},
        {"learning_rate": 1e39},
        {"process_timeout": float("inf")},
        {"epochs": 1.0},
        {"model": ""},
        {"reward": " "},
        {"prompts": ""},
        {"run_dir": ""},
        {"policy": 5},
    ],
)
def test_absurd_values_are_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} must be"):
        train_config(**settings)


def test_empty_arguments_are_refused(capsys):
    for flag in ("--run-dir", "--model", "--reward", "--prompts"):
        for arguments in ([flag, ""], [f"{flag}="]):
            with pytest.raises(SystemExit) as caught:
                parse_command_line(arguments)
            assert caught.value.code == 2
            assert f"{flag} must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 5),
        ({"noise_window": 3}, 3),
        ({"eta": (1.0, 0.0) * 5, "timestep_window": (0.0, 0.4)}, 2),
        ({"algorithm": "nft", "sampler": "ode"}, 5),
        ({"algorithm": "nft", "noise_window": 3}, 5),
    ],
)
def test_steps_without_noise_are_trained_on_only_without_log_probabilities(settings, steps):
    assert train_config(**settings).resolved().trained_steps == steps


@pytest.mark.parametrize("reward", ["votes", "aesthetic:1,votes:0.5"])
def test_votes_need_two_samples_of_a_prompt(reward):
    with pytest.raises(ValueError, match="samples_per_prompt must be at least 2 with reward votes.* got 1"):
        train_config(reward=reward, samples_per_prompt=1).resolved()
