"""How `scripts/experiments/reward_queries.py` counts the queries of a race and of TRL's trainer."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from agents import train_config


@pytest.fixture
def script(scripts_on_path):
    import reward_queries

    return reward_queries


def write_run(folder: Path, samples: int, rewards: list[float], read: list[float]) -> None:
    """Write what the script reads of a run: its settings, and an evaluation after every iteration."""
    folder.mkdir(parents=True)
    config = train_config(samples_per_iteration=samples, run_dir=folder).resolved()
    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    with (folder / "progress.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["time/iterations", "time/time_elapsed", "time/evaluation", "eval/reward_mean", "eval/holdout_reward_mean"]
        )
        for at, values in enumerate(zip(rewards, read, strict=True)):
            elapsed = 10 + 14 * at if at else ""  # an iteration of 4 s, and evaluations of 10 s from the beginning on
            writer.writerow([at, elapsed, 10, *values])
        writer.writerow([len(rewards), 14 * len(rewards), "", "", ""])  # an iteration without an evaluation


def test_queries_are_those_before_the_first_evaluation_that_is_good_enough(script):
    falling = script.Curve([0, 72, 144, 216], [0, 9, 18, 27], [-2.0, -1.6, -1.5, -1.7], [0.5, 0.6, 0.75, 0.7])
    quarter = script.Arguments(Path("race"))
    assert script.first_better(falling, quarter) == 2
    assert script.first_better(falling, replace(quarter, change=0.26)) is None
    assert script.first_better(script.Curve([0, 72], [0, 9], [2.0, 2.6], []), quarter) == 1  # a reward above 0
    assert script.first_better(falling, replace(quarter, points=10)) == 1
    assert script.first_better(falling, replace(quarter, points=30)) is None


def test_table_and_figure_of_a_race_beside_trl(script, tmp_path, monkeypatch, capsys):
    contenders = tmp_path / "race" / "contenders"
    write_run(contenders / "awm" / "seed-0", 36, [-2, -1.5, -1.4], [1, 0.5, 0.25])
    write_run(contenders / "awm" / "seed-1", 36, [-2, -1.9, -1.4], [1, 0.9, 0.75])
    write_run(contenders / "ppo" / "seed-0", 72, [-2, -1.9, -1.8], [1, 1, 1])
    (tmp_path / "trl.csv").write_text("iteration,reward_queries,reward_mean,seconds\n0,0,-2,7\n1,72,-1.4,25\n")
    figure = tmp_path / "new" / "figure.png"
    given = ["reward_queries.py", str(tmp_path / "race"), "--trl", str(tmp_path / "trl.csv"), "--output", str(figure)]
    monkeypatch.setattr(sys, "argv", given)
    script.main()
    printed = capsys.readouterr().out
    assert "| awm | 36, 72 | 54 | 4, 8 | 50%, 75% | -1.400, -1.400 |" in printed
    assert "| ppo | not in 144 | – | – | – | -1.800 |" in printed
    assert "| TRL's trainer | 72 | 72 | 18 | – | -1.400 |" in printed
    assert Image.open(figure).size[0] > 300
    monkeypatch.setattr(sys, "argv", [*given, "--points", "20"])
    with pytest.raises(SystemExit, match="points needs runs with --holdout-reward"):
        script.main()


def test_folder_without_a_race_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reward_queries.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="race must be the folder of a race; got"):
        script.main()
