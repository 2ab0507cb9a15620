"""The command that does a run again: it resolves to the same settings, and is short."""

import shlex

import pytest

from agents.config.command_line import parse_command_line
from agents.config.presets import preset_config
from agents.config.reproduction import flags_of, reproducing_command, reproducing_flags
from agents.config.train_config import TrainConfig, train_config

SETTINGS = [
    {},
    {"algorithm": "reinforce", "samples_per_iteration": 16, "shared_noise": True, "stop_on_divergence": False},
    {"reward_options": ("a=1", "b=it's -c"), "timestep_window": (0.2, 0.8), "learning_rate": 1e-5, "iterations": 3},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_command_resolves_to_the_settings_of_the_run(settings, tmp_path):
    config = train_config(**settings, run_dir=tmp_path).resolved()
    command = shlex.split(reproducing_command(config))
    assert command[0] == "ddpo-train"
    again = parse_command_line(command[1:]).config.resolved()
    assert again.changed(run_dir=tmp_path).flat() == config.flat()


def test_command_names_only_what_does_not_follow():
    assert reproducing_command(TrainConfig().resolved()) == "ddpo-train"
    config = preset_config("tiny-alignment").changed(iterations=2, eval_samples=8).resolved()
    expected = ["--preset", "tiny-alignment", "--iterations", "2", "--eval-samples", "8"]
    assert reproducing_flags(config) == expected


def test_command_of_several_processes_starts_as_many():
    command = shlex.split(reproducing_command(train_config(seed=3).resolved(2), 2))
    assert command == ["torchrun", "--nproc-per-node=2", "-m", "agents.training.command", "--seed", "3"]


def test_setting_without_an_argument_is_told():
    with pytest.raises(ValueError, match="only Python can set merge_lora"):
        reproducing_flags(train_config(merge_lora=True).resolved())


def test_value_cannot_become_a_flag():
    assert flags_of({"prompts": "--dry-run"}) == ["--prompts=--dry-run"]
