"""The paper's experiments as presets, and the dry run: what they set, who wins, and that nothing is loaded or left."""

import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.micro_agents import resume_config
from helpers.scripts import MINIATURE, SCRIPTS, run_script

from agents.config.command_line import parse_command_line
from agents.config.presets import PRESETS, preset_config
from agents.config.reproduction import flags_of, reproducing_flags
from agents.config.train_config import TrainConfig
from agents.distributed import Processes
from agents.planning.plan import describe_plan
from agents.training.preparation import check_run, prepare_run, run_training
from ddpo_env import vector_env
from ddpo_env.models import loading, sources

ROOT = SCRIPTS.parent
EXPERIMENTS = {  # reward, prompts, how many of them, samples and updates per iteration, iterations, stat buffer
    "sd14-compressibility": ("jpeg_compressibility", "imagenet_animals", 398, 256, 4, 100, 16),
    "sd14-incompressibility": ("jpeg_incompressibility", "imagenet_animals", 398, 256, 4, 100, 16),
    "sd14-aesthetic": ("aesthetic", "simple_animals", 45, 256, 2, 200, 32),
    "sd14-alignment": ("vlm_alignment", "animal_activities", 135, 288, 2, 200, 32),
}
AESTHETIC = [
    "preset     sd14-aesthetic",
    "model      CompVis/stable-diffusion-v1-4, 50 steps, guidance 5",
    "reward     aesthetic",
    "sampling   256 samples of 50 steps per iteration: 32 batches of 8, 256 prompts with 1 sample each",
    "training   ppo: 1 epoch of 2 updates with 128 samples × 50 of 50 steps = 6,400 pairs, in calls of up to 4 pairs",
    "total      200 iterations, 51,200 reward queries, at most 400 updates",
    # 200 × 256 × 50 × 2 and the same again; (before, 19 times between, after) × 64 × 50 × 2
    "denoiser   10,374,400 rows: 5,120,000 to sample, 5,120,000 to train, 134,400 for held-out images",
]


@pytest.fixture
def nothing_happens(monkeypatch, tmp_path):
    """An empty current folder, and errors wherever something would be loaded, looked for on the Hub or written."""

    def refuse(*_, **__):
        raise AssertionError("a dry run must not do this")

    monkeypatch.setattr(loading, "load_pipeline", refuse)
    monkeypatch.setattr(sources, "read_index", refuse)
    monkeypatch.setattr(vector_env, "load_model", refuse)
    monkeypatch.setattr("agents.training.run_folder.RunFolder.make", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    register = torch.nn.Module.register_parameter

    def register_shapes(module, name, weight):
        assert weight is None or weight.device.type == "meta", "a dry run must compute shapes alone"
        register(module, name, weight)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", register_shapes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(config):
    flat = {}
    for name, value in config.as_dict().items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def test_presets_are_the_experiments():
    tasks = ("compressibility", "incompressibility", "aesthetic", "alignment")
    assert set(EXPERIMENTS) == {f"sd14-{task}" for task in tasks}
    assert set(PRESETS) == set(EXPERIMENTS) | {f"tiny-{task}" for task in tasks}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_miniature_has_the_task_of_the_experiment(name):
    original, miniature = preset_config(name), preset_config(name.replace("sd14", "tiny"))
    assert miniature.reward == original.reward
    assert miniature.model == "tiny"
    if "compressibility" not in name:
        assert miniature.prompts == original.prompts
        assert miniature.reward_options == ("model=tiny",)
    check_run(miniature, Processes())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_preset_has_the_published_settings(name):
    reward, prompts, count, samples, updates, iterations, stat_buffer_size = EXPERIMENTS[name]
    expected = {
        "preset": name,
        "model": "CompVis/stable-diffusion-v1-4",
        "reward": reward,
        "prompts": prompts,
        "samples_per_iteration": samples,
        "updates_per_iteration": updates,
        "iterations": iterations,
        "stat_buffer_size": stat_buffer_size,
        "stat_min_count": 16,
        "advantage": "per_prompt",
        "advantage_clip": 5.0,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "eta": 1.0,
        "lora_rank": 4,
        "lora_targets": "attention",
        "log_prob_reduction": "mean",
        "algorithm": "ppo",
        "epochs": 1,
        "clip_range": 1e-4,
        "kl_coef": 0.0,
        "timestep_window": [0.0, 1.0],
        "timestep_fraction": 1.0,
        "samples_per_prompt": 1,
        "sample_batch_size": 8,
        "learning_rate": 3e-4,
        "learning_rate_schedule": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
    }
    found = settings(preset_config(name).resolved())
    assert {key: found[key] for key in expected} == expected
    assert len(check_run(preset_config(name), Processes()).prompts) == count


def test_a_variant_leaves_the_preset_as_it_is():
    assert preset_config("sd14-aesthetic").changed(clip_range=1.0).training.clip_range == 1.0
    assert preset_config("sd14-aesthetic").training.clip_range == 1e-4


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_presets_can_be_shared_by_two_four_or_eight_processes(name):
    def is_shareable(processes):
        try:
            preset_config(name).resolved(processes)
        except ValueError:
            return False
        return True

    assert [processes for processes in range(1, 17) if is_shareable(processes)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "sd14-aesthetic", "--samples-per-iteration", "64", "--timestep-window", "0", "0.9"],
        ["--samples-per-iteration", "64", "--timestep-window", "0", "0.9", "--preset", "sd14-aesthetic"],
        ["--samples_per_iteration=64", "--preset=sd14-aesthetic", "--timestep-window", "0", "0.9"],
        "--preset=sd14-alignment --timestep-window 0 0.9 --preset sd14-aesthetic --samples-per-iteration=64".split(),
    ],
)
def test_what_is_given_wins_wherever_it_stands(arguments):
    config = parse_command_line(arguments).config
    assert (config.samples_per_iteration, config.update.timestep_window) == (64, (0.0, 0.9))
    unchanged = config.changed(samples_per_iteration=256, timestep_window=(0.0, 1.0))
    assert unchanged == preset_config("sd14-aesthetic")


def test_a_default_can_be_given_against_the_preset():
    default = TrainConfig()
    arguments = ["--preset=sd14-aesthetic", f"--model={default.model}", f"--reward={default.reward}"]
    arguments += ["--learning-rate=None", "--reward-options", "preset=x", "--iterations=None"]
    config = parse_command_line(arguments).config
    assert (config.model, config.reward) == ("tiny", "jpeg_compressibility")
    assert (config.resolved().learning_rate, config.resolved().iterations) == (2e-3, 12)
    assert config.reward_options == ("preset=x",)


def test_without_a_preset_sizes_are_left_open_as_ever():
    assert parse_command_line([]).config == TrainConfig()
    assert parse_command_line(["--samples-per-iteration=64"]).config.resolved().training.sample_batch_size == 64
    assert parse_command_line(["--algorithm=rwr"]).config.resolved().training.epochs == 5


def test_epochs_are_those_of_the_algorithm():
    assert parse_command_line(["--preset=sd14-aesthetic", "--algorithm=rwr"]).config.resolved().training.epochs == 5
    assert parse_command_line(["--preset=sd14-aesthetic"]).config.resolved().training.epochs == 1


TUNED = ("learning_rate", "updates_per_iteration", "epochs")


def tuned(config):
    flat = settings(config.resolved())
    return tuple(flat[name] for name in TUNED)


@pytest.mark.parametrize(
    ("preset", "algorithm", "expected"),
    [
        ("tiny-alignment", "nft", (3e-3, 1, 1)),
        ("tiny-aesthetic", "awm", (3e-3, 1, 1)),
        ("tiny-aesthetic", "ppo", (5e-3, 4, 1)),
        ("tiny-alignment", "grpo", (2e-3, 4, 1)),
        ("tiny-alignment", "reinforce", (1e-2, 1, 1)),
        ("tiny-alignment", "rwr_sparse", (5e-4, 1, 50)),
        ("sd14-aesthetic", "nft", (3e-4, 1, 1)),  # the rate of the published model, and not of the bundled one
    ],
)
def test_what_is_tuned_for_the_algorithm_of_a_preset_is_not_for_another(preset, algorithm, expected):
    line = parse_command_line([f"--preset={preset}", f"--algorithm={algorithm}"]).config
    variant = preset_config(preset).changed(algorithm=algorithm)
    assert tuned(line) == tuned(variant) == expected
    assert tuned(line.resolved()) == expected
    command = reproducing_flags(line.resolved())
    assert not {f"--{name.replace('_', '-')}" for name in TUNED}.intersection(command)
    assert parse_command_line(command).config.resolved() == line.resolved()


@pytest.mark.parametrize(
    ("given", "expected"), [({"learning_rate": 5e-3}, (5e-3, 1, 1)), ({"updates_per_iteration": 2}, (3e-3, 2, 1))]
)
def test_what_the_user_gives_comes_before_the_algorithm_of_a_preset(given, expected, tmp_path):
    """The values are those of the presets, which nobody but the user wants for another algorithm."""
    name = "tiny-aesthetic" if "learning_rate" in given else "tiny-alignment"
    line = parse_command_line([f"--preset={name}", "--algorithm=nft", *flags_of(given)]).config
    assert tuned(line) == tuned(preset_config(name).changed(**given, algorithm="nft")) == expected
    again = parse_command_line(reproducing_flags(line.resolved())).config
    assert tuned(again) == expected
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(line.resolved().as_dict()))
    assert tuned(parse_command_line([f"--config={tmp_path}", "--reward-options=model=tiny"]).config) == expected


def test_help_shows_the_options_and_the_defaults_of_the_preset(capsys):
    for arguments, samples in ([], "72"), (["--preset=sd14-alignment"], "288"):
        with pytest.raises(SystemExit) as stop:
            parse_command_line([*arguments, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert "--preset" in shown
        assert "--dry-run" in shown
        section = shown[shown.index("--samples-per-iteration") :]
        assert section[section.index("(default: ") :].startswith(f"(default: {samples})")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=sd15"], f"preset must be one of {', '.join(PRESETS)}; got 'sd15'"),
        (["--preset=sd14-aesthetic", "--resume=somewhere"], "preset must not be given with resume, .*'sd14-aesthetic'"),
        (["--preset=sd14-aesthetic", "--samples-per-iteration=100"], "must divide samples_per_iteration=100; got 8"),
        (
            ["--preset=sd14-aesthetic", "--stat-buffer-size=8"],
            "stat_min_count must be between 2 and stat_buffer_size=8",
        ),
        (
            ["--preset=sd14-aesthetic", "--algorithm=reinforce", "--updates-per-iteration=2"],
            "updates_per_iteration must be 1 with reinforce",
        ),
        (["--preset=sd14-aesthetic", "--prompts=animalz"], "prompts must be one of simple_animals, .*'animalz'"),
        (["--preset=sd14-aesthetic", "--reward=jpg"], "reward must be one of jpeg_compressibility, .*'jpg'"),
        (["--preset=sd14-aesthetic", "--reward-options=factor=2"], "reward_options of aesthetic must be .* got factor"),
        (["--preset=sd14-alignment", "--reward-options", "server=ftp://x"], "server must be a URL .*'ftp://x'"),
        (["--preset=sd14-aesthetic", "--model=tinny"], "model must be a bundled name .*'tinny'"),
        (["--preset=sd14-aesthetic", "--device=cuda:99"], "device must be auto or one of cpu.*'cuda:99'"),
        (["--preset=sd14-aesthetic", "--run-dir=old"], "run_dir 'old' holds a run already"),
    ],
)
def test_dry_run_refuses_as_a_run_does(nothing_happens, monkeypatch, capsys, arguments, message):
    (nothing_happens / "old").mkdir()
    (nothing_happens / "old" / "config.yaml").touch()
    shown = []
    for more in (["--dry-run"], []):
        assert run_script("train_ppo", [*arguments, *more], monkeypatch) == 2
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert shown[0].out == ""
    with pytest.raises(ValueError, match=f"^error: .*{message}"):
        raise ValueError(shown[0].err)


@pytest.mark.usefixtures("count_once")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_dry_run_loads_nothing_and_leaves_nothing(nothing_happens, monkeypatch, capsys, name):
    assert run_script("train_ppo", ["--dry-run", "--preset", name, "--device=cpu"], monkeypatch) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    config = preset_config(name).changed(device="cpu").resolved()
    *plan, weights, time = shown.out.splitlines()
    assert plan == describe_plan(config)
    assert weights.startswith("weights    3.44 GB unet, 335 MB vae, 492 MB text_encoder; ")  # in float32
    assert time.startswith("time       about ")
    assert list(nothing_happens.iterdir()) == []


@pytest.mark.usefixtures("count_once")
def test_dry_run_asks_no_server(nothing_happens, monkeypatch, capsys):
    arguments = ["--preset=sd14-alignment", "--reward-options", "server=http://localhost:1/v1", "--dry-run"]
    assert run_script("train_ppo", arguments, monkeypatch) == 0
    assert "reward     vlm_alignment: server=http://localhost:1/v1" in capsys.readouterr().out


def test_dry_run_looks_into_a_folder_but_not_at_its_weights(monkeypatch, capsys, tmp_path, micro_pipeline_folder):
    monkeypatch.setattr(loading, "load_pipeline", None)
    arguments = [*MINIATURE, "--dry-run", f"--run-dir={tmp_path / 'run'}", "--model"]
    assert run_script("train_ppo", [*arguments, micro_pipeline_folder], monkeypatch) == 0
    (tmp_path / "model").mkdir()
    for content, message in (('{"_class_name": "DDIMPipeline"}', "of a DDIMPipeline"), ("{}", "names no _class_name")):
        (tmp_path / "model" / "model_index.json").write_text(content)
        assert run_script("train_ppo", [*arguments, tmp_path / "model"], monkeypatch) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dry_run_of_a_run_to_go_on_with(monkeypatch, capsys, tmp_path, micro_pipeline_folder):
    run = tmp_path / "run"
    arguments = [*MINIATURE, f"--model={micro_pipeline_folder}", f"--run-dir={run}", "--iterations=1"]
    assert run_script("train_ppo", arguments, monkeypatch) == 0
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert (
        run_script("train_ppo", [f"--resume={run}", *arguments[-3:-2], "--iterations=1000", "--dry-run"], monkeypatch)
        == 0
    )
    assert "total      1,000 iterations, 4,000 reward queries, at most 4,000 updates" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files


def test_plan_of_a_preset():
    config = preset_config("sd14-aesthetic").changed(device="cpu").resolved()
    assert describe_plan(config) == AESTHETIC
    config = config.changed(dtype="bfloat16")
    assert describe_plan(config)[-1].endswith("held-out images, 5,120,000 to compute log-probabilities again")
    assert describe_plan(config)[-1].startswith("denoiser   15,494,400 rows")


def test_plan_says_what_was_changed_in_the_preset():
    arguments = ["--preset=sd14-aesthetic", "--samples-per-iteration=64", "--seed=1", "--run-dir=x", "--device=cpu"]
    plan = describe_plan(check_run(parse_command_line(arguments).config, Processes()).config)
    assert plan[0] == "preset     sd14-aesthetic, but samples_per_iteration=64, seed=1"


def test_preset_is_in_the_run_folder_and_survives_resuming(micro_pipeline_folder, tmp_path):
    arguments = ["--preset=sd14-compressibility", *MINIATURE, f"--model={micro_pipeline_folder}", "--iterations=1"]
    arguments += [f"--run-dir={tmp_path}", "--updates-per-iteration=1", "--stat-buffer-size=2"]
    run_training(parse_command_line(arguments).config)
    resumed = prepare_run(resume_config(tmp_path, iterations=2)).config
    assert resumed.preset == "sd14-compressibility"
    assert describe_plan(resumed)[0].startswith("preset     sd14-compressibility, but model=")
    assert describe_plan(resumed.changed(preset="of-another-version"))[0].startswith("model      ")


def test_commands_of_the_docs_are_valid():
    pages = [(ROOT / name).read_text("utf-8") for name in ("README.md", "docs/training.md")]
    commands = [line.partition("#")[0] for page in pages for line in re.findall(r"train_ppo.py (.*--preset .*)", page)]
    assert len(commands) >= 5
    for command in commands:
        parse_command_line(command.split()).config.resolved()


@pytest.mark.slow
def test_dry_run_as_a_user_starts_it(tmp_path):
    command = [sys.executable, str(SCRIPTS / "train_ppo.py"), "--preset", "sd14-aesthetic", "--dry-run", "--device=cpu"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    *plan, weights, time = done.stdout.splitlines()
    assert plan == AESTHETIC
    assert weights.startswith("weights    3.44 GB unet")
    assert time.startswith("time       about ")
    assert list(tmp_path.iterdir()) == []
