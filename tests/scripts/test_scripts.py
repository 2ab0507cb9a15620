"""The commands as a user runs them: help, errors, a miniature of each, and Ctrl-C."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.micro_families import micro_family
from helpers.paths import ROOT, SCRIPTS
from helpers.scripts import MINIATURE, run_script
from PIL import Image

from agents.evaluation.sample import SampleArguments, generate
from ddpo_env.models import load_model

PROMISED_FLAGS = (
    "--run-dir --model --reward --prompts --seed --device --iterations --samples-per-iteration --num-inference-steps "
    "--guidance-scale --eta --noise-level --learning-rate --clip-range --lora-rank"
).split()
FOLDERS = ("benchmarks", "bundled_models", "experiments")
COMMANDS = sorted(path for folder in (".", *FOLDERS) for path in (SCRIPTS / folder).glob("*.py"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_every_file_is_a_command_with_help(command, monkeypatch, capsys):
    """Libraries of commands are in folders of their own, beside the commands."""
    monkeypatch.setattr(sys, "argv", [command.name, "--help"])
    monkeypatch.setattr(sys, "path", [str(command.parent), *sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(command), run_name="__main__")
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


HELP = """
import importlib, sys
sys.argv = ["command", "--help"]
commands = (f"commands.{name}.command" for name in ("doctor", "export", "race"))
for module in ("training.command", *commands, "commands.sample", "commands.evaluate", "report.command"):
    try:
        importlib.import_module(f"agents.{module}").main()
    except SystemExit as left:
        assert left.code == 0
print(sorted({"torch", "diffusers", "transformers"} & sys.modules.keys()), file=sys.stderr)
"""


def test_help_needs_no_torch():
    """Its import takes seconds, in which a user waits for the help or for the error of a wrong setting."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", HELP], env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.count("--help") >= 5


def test_help_lists_every_promised_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script("train_ppo", ["--help"], monkeypatch)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    missing = [flag for flag in PROMISED_FLAGS if flag not in shown]
    assert missing == []


def test_training_leaves_weights_images_and_a_summary(monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    assert run_script("train_ppo", [*MINIATURE, "--iterations=1", f"--run-dir={run}"], monkeypatch) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 1
    assert summary["wall_clock_seconds"] > 0
    shown = capsys.readouterr().out
    assert f"{summary['reward_before']:.3f}" in shown
    assert f"{summary['reward_after']:.3f}" in shown
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert Image.open(run / "samples" / "before_after.png").size[0] > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=tinny"], "tiny"),
        (["--reward=jpg"], "jpeg_compressibility"),
        (["--prompts=animalz"], "simple_animals"),
        (["--device=cuda:9"], "cpu"),
        (["--num-inference-steps=0"], "[1, "),
        (["--eta=-1"], "[0, "),
        (["--sampler=dance"], "ddim, ode"),
        (["--sample-batch-size=3"], "2 or 4"),
        (["--resume=/nowhere"], "config.yaml"),
    ],
)
def test_bad_arguments_exit_with_the_valid_choices(arguments, message, monkeypatch, capsys, tmp_path):
    command = [*MINIATURE, f"--run-dir={tmp_path / 'run'}", *arguments]
    try:
        code = run_script("train_ppo", command, monkeypatch)
    except SystemExit as stop:  # a value that is not valid by itself is refused while the command line is parsed
        code = stop.code
    shown = capsys.readouterr().err
    assert code == 2
    assert message in shown
    assert not (tmp_path / "run").exists()


def test_sample_uses_the_same_noise_with_and_without_a_lora(monkeypatch, tmp_path):
    run = tmp_path / "run"
    sizes = [*MINIATURE, "--learning-rate=0.01"]
    assert run_script("train_ppo", [*sizes, "--iterations=2", f"--run-dir={run}"], monkeypatch) == 0
    sampling = ["--prompts", "a cat", "a fox", "--seeds", "3", "--num-inference-steps=2", "--device=cpu"]
    compared = [f"--output={tmp_path / 'compared.png'}", f"--lora={run / 'lora'}", "--compare"]
    assert run_script("sample", [*sampling, *compared], monkeypatch) == 0
    assert run_script("sample", [*sampling, f"--output={tmp_path / 'base.png'}"], monkeypatch) == 0
    both, base = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("compared.png", "base.png"))
    height = base.shape[0]
    upper, lower = both[:height, 84:], both[height - base.shape[0] + 134 :, 84:]
    np.testing.assert_array_equal(upper[:, : base.shape[1] - 84], base[:, 84:])
    assert not np.array_equal(upper[-128:], lower[-128:])


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "stable_diffusion_3", "flux_dev", "flux_schnell"])
def test_sample_works_with_every_text_to_image_family(monkeypatch, tmp_path, family):
    micro_family(family).save_pretrained(tmp_path / family)
    sampling = [f"--model={tmp_path / family}", "--num-inference-steps=2", "--device=cpu", "--guidance-scale=2"]
    output, film = tmp_path / "samples.png", tmp_path / "film.gif"
    prompts = ["--prompts", "a cat", "a dog", f"--output={output}", f"--film={film}"]
    assert run_script("sample", [*sampling, *prompts], monkeypatch) == 0
    with Image.open(output) as grid, Image.open(film) as frames:
        assert (frames.n_frames, frames.size) == (2, grid.size)


@pytest.mark.parametrize("model", ["points", "ddpm"])
def test_sample_refuses_a_model_that_takes_no_prompts(monkeypatch, capsys, tmp_path, model):
    if model == "ddpm":
        micro_family("ddpm").save_pretrained(tmp_path / "ddpm")
        model = str(tmp_path / "ddpm")
    assert run_script("sample", [f"--model={model}", "--device=cpu"], monkeypatch) == 2
    assert "model must be a text-to-image pipeline; got" in capsys.readouterr().err


def test_sample_generates_at_a_resolution(monkeypatch, capsys, tmp_path):
    sampling = ["--prompts", "a cat", "--seeds", "0", "--num-inference-steps=1", "--device=cpu"]
    assert run_script("sample", [*sampling, "--resolution=48", f"--output={tmp_path / 'x.png'}"], monkeypatch) == 0
    settings = {"prompts": ("a cat",), "seeds": (0,), "num_inference_steps": 1, "device": "cpu"}
    shapes = [generate(SampleArguments(**settings, resolution=side))[0][0].shape for side in (None, 48)]
    assert shapes == [(1, 64, 64, 3), (1, 48, 48, 3)]
    assert generate(SampleArguments(**settings, resolution="48x32"))[0][0].shape[1:] == (32, 48, 3)
    assert run_script("sample", [*sampling, "--resolution=48x30"], monkeypatch) == 2
    assert "resolution must be a multiple of" in capsys.readouterr().err
    assert run_script("sample", [*sampling, "--resolution=47"], monkeypatch) == 2
    assert "resolution must be a multiple of" in capsys.readouterr().err


def test_sample_leaves_the_model_as_it_was():
    model = load_model("tiny", "cpu")
    scheduler = model.pipeline.scheduler
    generate(SampleArguments(prompts=("a cat",), seeds=(0,), num_inference_steps=1, device="cpu"))
    assert model.pipeline.scheduler is scheduler


def test_error_shows_square_brackets(monkeypatch, capsys, tmp_path):
    assert run_script("sample", [f"--lora={tmp_path / '[a]'}"], monkeypatch) == 2
    assert "[a]" in capsys.readouterr().err


def test_sample_refuses_a_folder_without_a_lora(monkeypatch, capsys, tmp_path):
    assert run_script("sample", [f"--lora={tmp_path}"], monkeypatch) == 2
    assert "pytorch_lora_weights.safetensors" in capsys.readouterr().err


def test_ctrl_c_stops_at_a_finished_iteration_and_the_run_goes_on(monkeypatch, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(SCRIPTS / "train_ppo.py"), *MINIATURE, "--iterations=500", f"--run-dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/iteration_*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=100)
    assert process.returncode == 130, shown
    assert f"--resume {run}" in " ".join(shown.split())
    done = json.loads((max(run.glob("checkpoints/iteration_*")) / "state.json").read_text())["iteration"]
    assert f"Stopped after {done} iterations" in shown
