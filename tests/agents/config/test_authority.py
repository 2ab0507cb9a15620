"""What a resumed run may do: a foreign run folder chooses no code, no server, no secret and no path outside it."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.scripts import run_script

from agents import train_config
from agents.config.authority import resume_flags
from agents.config.command_line import parse_command_line
from agents.config.resolve import resolve
from agents.config.train_config import TrainConfig


def write_run(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = resolve(train_config(run_dir=folder, **settings))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict()), encoding="utf-8")
    return folder


BOMB = """
from pathlib import Path
Path({marker!r}).touch()
class Bomb:
    def __init__(self, **options): Path({marker!r}).touch()
    def __call__(self, images, prompts, metadata): return [0.0] * len(images)
"""


@pytest.mark.parametrize(
    "reward", ["bomb:Bomb", "jpeg_compressibility:1,bomb:Bomb:2", "bomb:Bomb:0.5:raw", "rewards.formulas.jpeg:ring"]
)
@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_no_code_of_a_run_folder_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reward: str,
    how: list[str],
) -> None:
    marker = tmp_path / "exploded"
    (tmp_path / "bomb.py").write_text(BOMB.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    run = write_run(tmp_path / "run", reward=reward)
    assert run_script("train_ppo", [f"--resume={run}", *how], monkeypatch) == 2
    assert not marker.exists()
    assert f"--reward={reward}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("server=http://203.0.113.1:8000",),
        ("server=http://203.0.113.1", "judge_options.api_key_variable=HOME"),
        ("model=tiny", "text_model=tiny", "log_folder=/tmp/elsewhere"),
        ("model=/somewhere/else",),
    ],
)
def test_servers_variables_and_paths_are_named_again(tmp_path: Path, options: tuple[str, ...]) -> None:
    run = write_run(tmp_path / "run", reward="vlm_alignment", reward_options=options)
    with pytest.raises(ValueError, match="uses code, a server, an environment variable or a path outside") as caught:
        resolve(train_config(resume=run))
    assert f"--reward-options {shlex.join(options)}" in str(caught.value)
    config = resolve(train_config(resume=run, reward_options=options))
    assert config.reward_options == options


def test_held_out_reward_is_named_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose code is the user's, and one that leaves the machine; a built-in one that does not is not asked for."""
    marker = tmp_path / "exploded"
    (tmp_path / "bomb.py").write_text(BOMB.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    run = write_run(tmp_path / "run", holdout_reward="bomb:Bomb", holdout_reward_options=("size=2",))
    with pytest.raises(ValueError, match="uses code, a server") as caught:
        resolve(train_config(resume=run))
    line = parse_command_line(["--resume", str(run), *shlex.split(str(caught.value).splitlines()[-1])])
    assert resolve(line.config).run.holdout_reward == "bomb:Bomb"
    assert not marker.exists()
    with pytest.raises(ValueError, match="holdout_reward must not differ from the run's own, 'bomb:Bomb'"):
        resolve(train_config(resume=run, holdout_reward="aesthetic", holdout_reward_options=("size=2",)))
    server = ("server=http://203.0.113.1:8000", "device=cpu")
    run = write_run(tmp_path / "served", holdout_reward="vlm_alignment", holdout_reward_options=server)
    with pytest.raises(ValueError, match=r"\(holdout_reward_options\)"):
        resolve(train_config(resume=run))
    other = ("server=http://localhost:8000", "device=cpu")
    assert resolve(train_config(resume=run, holdout_reward_options=other)).run.holdout_reward_options == other
    assert resume_flags(TrainConfig.read(run).changed(run_dir=run)) == ["--holdout-reward-options", *server]
    run = write_run(tmp_path / "plain", holdout_reward="jpeg_incompressibility")
    assert resolve(train_config(resume=run)).run.holdout_reward == "jpeg_incompressibility"


def test_text_that_reaches_nothing_is_not_asked_for(tmp_path: Path) -> None:
    options = ("device=cpu", "question=What is this?", "log_per_call=2")
    run = write_run(tmp_path / "run", reward="vlm_alignment", reward_options=options)
    assert resolve(train_config(resume=run)).reward_options == options


def test_printed_line_is_what_must_be_added(tmp_path: Path) -> None:
    """Pasted as it is, also with spaces and quotes in it."""
    model = tmp_path / "my $(model)"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    prompts = tmp_path / "prompts 'a'.txt"
    prompts.write_text("a cat\n")
    run = write_run(
        tmp_path / "run",
        model=str(model),
        prompts=str(prompts),
        reward="my.module:Reward",
        reward_options=("path=a b", "level=3"),
    )
    with pytest.raises(ValueError, match="by adding:") as caught:
        resolve(train_config(resume=run))
    line = str(caught.value).splitlines()[1]
    config = resolve(parse_command_line(["--resume", str(run), *shlex.split(line)]).config)
    assert (config.reward, config.model, config.prompts) == ("my.module:Reward", str(model), str(prompts))
    assert shlex.split(line) == resume_flags(config)


def test_pasted_options_cannot_become_flags(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", reward="my.module:Reward", reward_options=("--reward=subprocess:Popen",))
    with pytest.raises(ValueError, match="reward_options must be key=value pairs"):
        resolve(train_config(resume=run))


def test_wrong_options_of_a_resumed_run_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", holdout_reward="aesthetic")
    with pytest.raises(ValueError, match="^holdout_reward_options must be key=value pairs; got 'device'"):
        resolve(train_config(resume=run, holdout_reward_options=("device",)))


def test_paths_inside_the_run_folder_are_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    inside, outside = run / "prompts.txt", tmp_path / "outside.txt"
    for path in (inside, outside):
        path.write_text("a cat\n")
    write_run(run, prompts=str(inside))
    assert resolve(train_config(resume=run)).prompts == str(inside)
    inside.unlink()
    inside.symlink_to(outside)
    with pytest.raises(ValueError, match=r"\(prompts\)"):
        resolve(train_config(resume=run))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "0.5"], "learning_rate must not differ from the run's own, 0.25, with resume"),
        (["--lora_rank=8"], "lora_rank must not differ from the run's own, 2"),
        (["--no-critic"], "critic must not differ from the run's own, True"),
        (["--reward", "jpeg_compressibility"], "reward must not differ from the run's own, 'jpeg_incompressibility'"),
        (["--run-dir", "elsewhere"], "run_dir must not differ"),
        (["--model", "points"], "model must not differ from the run's own, 'tiny'"),
        (["--reward-options", "device=cpu"], "reward_options must not differ"),
        (["--process-timeout", "1800"], "process_timeout must not differ from the run's own, 60"),
    ],
)
def test_other_settings_beside_resume_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Also those with the value that is the default of a new run."""
    settings: dict[str, Any] = {"learning_rate": 0.25, "lora_rank": 2, "critic": True, "process_timeout": 60.0}
    run = write_run(tmp_path / "run", reward="jpeg_incompressibility", **settings)
    with pytest.raises(ValueError, match=message):
        resolve(parse_command_line([f"--resume={run}", *arguments]).config)
    with pytest.raises(ValueError, match="lora_rank must not differ"):
        resolve(train_config(resume=run, lora_rank=8))
    same = parse_command_line([f"--resume={run}", "--lora-rank=2", "--critic", "--iterations=30", f"--run-dir={run}"])
    assert resolve(same.config).iterations == 30


def test_a_run_goes_on_with_the_files_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    for folder, prompt in ((home, "a cat\n"), (away, "a dog\n")):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "model_index.json").write_text("{}")
        (folder / "prompts.txt").write_text(prompt)
    monkeypatch.chdir(home)
    run = write_run(tmp_path / "run", model="./model", prompts="prompts.txt")
    monkeypatch.chdir(away)
    own = TrainConfig.read(run)
    assert (own.model, own.prompts) == (str(home / "model"), str(home / "prompts.txt"))
    again = train_config(resume=run, model=own.model, prompts=own.prompts)
    assert resolve(again).prompts == str(home / "prompts.txt")
    other = resolve(again.changed(prompts="prompts.txt"))
    assert other.prompts == str(away / "prompts.txt")
    assert other.run.prompts_sha256 != own.run.prompts_sha256
    (home / "prompts.txt").write_text("a wolf\n")
    with pytest.raises(ValueError, match=r"prompts: .*home/prompts.txt' has changed since the run began"):
        resolve(again)
    (home / "prompts.txt").unlink()
    with pytest.raises(ValueError, match=r"prompts: .*home/prompts.txt' no longer exists"):
        resolve(again)
    (home / "prompts.txt").write_text("a cat\n")
    (home / "model" / "model_index.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(ValueError, match=r"model: .*home/model' has changed"):
        resolve(again)
