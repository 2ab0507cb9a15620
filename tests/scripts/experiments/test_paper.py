"""`scripts/experiments/paper.py`: what it runs, what it does not run again, and its tables and figures."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from agents.config.presets import preset_config

FIELDS = ("time/iterations", "eval/reward_mean", "eval/holdout_reward_mean", "eval/kl_to_pretrained")


@pytest.fixture
def script(scripts_on_path):
    import paper

    return paper


def make_run(folder: Path, holdout: tuple[float, float, float], iterations: int) -> None:
    """Write the files of a run that the script reads."""
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "samples/before_after.png")
    before, _, after = holdout
    with (folder / "progress.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerow((0, 5.0, before, 0.0))
        writer.writerow((1, "", "", ""))
        writer.writerow((iterations, 8.0, after, 0.04))
    summary = {
        **{"reward_before": 5.0, "reward_after": 8.0, "reward_queries": 1440, "wall_clock_seconds": 61.7},
        **{f"holdout_reward_{name}": value for name, value in zip(("before", "best", "after"), holdout, strict=True)},
        **{"best_iteration": 4, "iterations": iterations},
    }
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")


def test_tables_and_figures_are_those_of_the_runs(script, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "aesthetic-7", (6.0, 7.0, 6.2), 20)
    (tmp_path / "aesthetic-evaluation").mkdir()
    (tmp_path / "aesthetic-evaluation/evaluation.md").write_text("| of the evaluation |\n", "utf-8")
    (tmp_path / "over_optimisation/images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "over_optimisation/images/over_optimisation.png")
    arguments = [
        "--only-draw",
        "--tasks",
        "aesthetic",
        "--seeds",
        "7",
        "--others",
        "over_optimisation",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", ["paper.py", *arguments])
    script.main()
    printed = capsys.readouterr().out
    row = "| aesthetic | 5.000 → 8.000 | tiny_preference | 6.000 → 7.000 → 6.200 | 1440 | 62 |"
    assert row in printed
    assert "| of the evaluation |" in printed
    images = tmp_path / "images"
    drawn = {"four_tasks.png", "aesthetic_before_after.png", "over_optimisation.png"}
    assert {path.name for path in images.iterdir()} == drawn


def test_missing_package_of_the_judge_ends_it_before_the_first_run(script, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a run began"))
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setattr("sys.argv", ["paper.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="torchmetrics"):
        script.main()


def test_all_experiments_of_the_paper_follow_in_folders_of_their_own(script, tmp_path, monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command[1:]))
    make_run(tmp_path / "aesthetic-7", (6.0, 7.0, 6.2), 20)
    (tmp_path / "aesthetic-evaluation").mkdir()
    (tmp_path / "aesthetic-evaluation/evaluation.md").touch()
    for name in ("trainings", "evaluations"):
        monkeypatch.setattr(script, name, lambda _: ())
    monkeypatch.setattr("sys.argv", ["paper.py", "--tasks", "aesthetic", "--seeds", "7", "--output", str(tmp_path)])
    script.main()
    assert [Path(command[0]).stem for command in commands] == ["over_optimisation", "algorithms", "typographic_attack"]
    assert [Path(command[-1]) for command in commands] == [tmp_path / name for name in script.OTHERS]
    assert all((script.ROOT / command[0]).is_file() for command in commands)


def test_what_ended_is_not_repeated_and_what_was_interrupted_is_resumed(script, tmp_path, monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command[1:]))
    arguments = script.Arguments(tasks=("compressibility", "alignment", "aesthetic"), seeds=(3,), output=tmp_path)
    make_run(tmp_path / "compressibility-3", (0.9, 0.9, 0.5), 12)
    folder = tmp_path / "aesthetic-3"
    folder.mkdir()
    settings = preset_config("tiny-aesthetic").changed(holdout_reward="tiny_preference", run_dir=folder).resolved()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.as_dict()), "utf-8")
    for command, folder in script.trainings(arguments):
        script.finish(command, folder)
    fresh, resumed = commands
    assert fresh[1:] == [
        *("--preset", "tiny-alignment", "--holdout-reward", "tiny_reader", "--seed", "3", "--eval-interval", "2"),
        *("--run-dir", str(tmp_path / "alignment-3")),
    ]
    resume = ["--resume", str(tmp_path / "aesthetic-3")]
    assert resumed == ["scripts/train_ppo.py", *resume, "--reward-options", "model=tiny"]
