"""`ddpo-doctor` from its command line: what it prints and writes, its exit code, the settings that it recommends."""

import json
import shlex
import sys
from dataclasses import replace

import pytest
from helpers.micro_agents import micro_config
from helpers.scripts import run_script
from rich.console import Console

from agents.commands.doctor.checks import CHECKS
from agents.commands.doctor.command import main
from agents.commands.doctor.finding import Finding, graded
from agents.commands.doctor.report import levels, recommended, show, train_command, write_json, write_settings
from agents.config.command_line import parse_command_line
from agents.config.train_config import TrainConfig, train_config

MICRO = [
    "--reward=helpers.micro_agents:brightness",
    "--num-inference-steps=3",
    "--samples-per-iteration=8",
    "--samples-per-prompt=2",
    "--sample-batch-size=4",
    "--train-batch-size=5",
    "--updates-per-iteration=2",
    "--stat-min-count=2",
    "--lora-rank=2",
    "--guidance-scale=2",
    "--device=cpu",
]


@pytest.fixture
def run_doctor(monkeypatch, capsys):
    """Run the command; return its exit code, and what it printed and wrote to standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ddpo-doctor", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.mark.slow  # the micro pipeline goes through the same checks in test_model_faults.py
def test_bundled_model_is_healthy_in_less_than_a_minute(tmp_path, monkeypatch, capsys):
    assert run_script("doctor", ["--output", tmp_path / "doctor", "--device=cpu"], monkeypatch) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "doctor" / "doctor.json").read_text("utf-8"))
    assert [one["name"] for one in content["findings"]] == list(CHECKS)
    assert content["levels"] == {"green": len(CHECKS), "amber": 0, "red": 0}
    assert sum(one["seconds"] for one in content["findings"]) < 60
    assert all(one["meaning"] in " ".join(printed.split()) for one in content["findings"])
    assert (tmp_path / "doctor" / "samplers.png").is_file()


def test_red_finding_is_exit_code_1_and_fix_up_writes_settings(run_doctor, micro_pipeline_folder, tmp_path):
    output, run_dir = tmp_path / "doctor", tmp_path / "run"
    model = [f"--model={micro_pipeline_folder}", f"--run-dir={run_dir}", f"--output={output}", "--learning-rate=1"]
    code, printed, _ = run_doctor(*MICRO, *model, "--fix-up")
    assert code == 1
    assert "red   update" in printed
    assert not run_dir.exists()
    fixed = TrainConfig.read(output)
    assert fixed.learning_rate < 0.1
    assert fixed.reward == "helpers.micro_agents:brightness"
    (command,) = [line for line in printed.splitlines() if line.startswith("  ddpo-train ")]
    config = parse_command_line(shlex.split(command)[1:]).config.resolved()
    assert config.learning_rate == fixed.learning_rate
    assert config.flat() | {"model_sha256": None, "model": None} == fixed.flat() | {"model_sha256": None, "model": None}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--reward=nothing"], "reward"),
        (["--model=/nowhere"], "model"),
        (["--num-inference-steps=2000"], "num_inference_steps"),
        (["--sample-batch-size=7"], "sample_batch_size"),
        (["--resume=."], "resume"),
        (["--preset=none"], "preset"),
        (["--learning-rate=fast"], "learning-rate"),
        (["--output="], "output"),
    ],
)
def test_wrong_input_is_exit_code_2_and_nothing_is_written(arguments, named, run_doctor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_doctor("--device=cpu", *arguments)
    assert code == 2
    assert named in error
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_examination(run_doctor, tmp_path, monkeypatch):
    def interrupted(examination):
        raise KeyboardInterrupt

    monkeypatch.setitem(CHECKS, "machine", interrupted)
    code, _, error = run_doctor("--device=cpu", f"--output={tmp_path / 'doctor'}")
    assert code == 130
    assert "Interrupted" in error


def test_output_that_is_a_file_is_refused(run_doctor, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, error = run_doctor("--device=cpu", f"--output={tmp_path / 'file'}")
    assert code == 2
    assert "output must be a folder" in error
    assert (tmp_path / "file").read_text() == "mine"


def test_preset_is_the_default_of_the_other_settings(run_doctor):
    code, printed, _ = run_doctor("--preset=sd14-aesthetic", "--help")
    assert code == 0
    assert "--fix-up" in printed
    assert "CompVis/stable-diffusion-v1-4" in printed


@pytest.mark.parametrize(
    ("value", "level"), [(0.0, "green"), (1.0, "green"), (1.5, "amber"), (3.0, "red"), (float("nan"), "red")]
)
def test_level_of_a_number(value, level):
    assert graded(value, 1.0, 2.0) == level


def test_recommended_settings_of_the_first_finding_win(tmp_path):
    findings = [
        Finding("a", "amber", {}, "", settings={"learning_rate": 1e-4}),
        Finding("b", "red", {}, "", settings={"learning_rate": 1e-5, "train_batch_size": 4}),
    ]
    config = micro_config("tiny", tmp_path / "run").resolved()
    fixed, changes = recommended(config, findings)
    assert changes == {"learning_rate": 1e-4, "train_batch_size": 4}
    assert (fixed.learning_rate, fixed.training.train_batch_size) == (1e-4, 4)
    write_settings(tmp_path, fixed)
    assert TrainConfig.read(tmp_path).flat() == fixed.flat()


def test_learning_rate_is_not_changed_together_with_the_window(tmp_path):
    findings = [
        Finding("timesteps", "amber", {}, "", settings={"timestep_window": (0.0, 0.8)}),
        Finding("update", "amber", {}, "", settings={"learning_rate": 1e-5}),
    ]
    fixed, changes = recommended(micro_config("tiny", tmp_path / "run").resolved(), findings)
    assert changes == {"timestep_window": (0.0, 0.8)}
    assert fixed.learning_rate == 2e-3


def test_command_has_what_the_user_gave_and_what_is_recommended():
    given = train_config(guidance_scale=3.0, vae_tiling=True, reward_options=("a=1", "b=c d"))
    command = shlex.split(train_command(given, {"timestep_window": (0.0, 0.8), "dtype": "float32"}))
    again = parse_command_line(command[1:]).config
    assert again.flat() == given.changed(timestep_window=(0.0, 0.8), dtype="float32").flat()


def test_command_does_not_give_another_algorithm_what_a_preset_is_tuned_for():
    given = parse_command_line(["--preset=tiny-aesthetic", "--algorithm=nft"]).config
    again = parse_command_line(shlex.split(train_command(given, {}))[1:]).config
    assert again.resolved() == given.resolved()
    assert again.resolved().learning_rate == 3e-3


def test_json_has_no_number_that_json_lacks(tmp_path):
    finding = Finding("a", "red", {"loss": float("nan"), "by_step": {1.5: [float("inf"), 2]}}, "broken")
    write_json(tmp_path, TrainConfig(), [finding])
    (read,) = json.loads((tmp_path / "doctor.json").read_text("utf-8"))["findings"]
    assert read["numbers"] == {"loss": "nan", "by_step": {"1.5": ["inf", 2]}}
    assert levels([finding]) == {"green": 0, "amber": 0, "red": 1}


def test_text_of_an_error_cannot_control_the_terminal():
    console = Console(record=True, width=80)
    finding = Finding("a", "red", {}, "[bold]\x1b[2Jgone", advice="x " * 100)
    show(replace(finding, name="b\x07"), console)
    text = console.export_text()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]\\x1b[2Jgone" in text
