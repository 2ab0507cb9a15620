"""`scripts/experiments/over_optimisation.py`: what it runs, and its tables and figure."""

import json

import numpy as np
import pytest


@pytest.fixture
def script(scripts_on_path):
    import over_optimisation

    return over_optimisation


PREFERENCES = (*np.linspace(5, 6, 11), *np.linspace(5.95, 5.5, 10))
"""Best after iteration 10, and half of the gain is lost after 20."""


def make_run(folder, preferences):
    noise = np.random.default_rng(0).normal(0, 0.05, (2, len(preferences), 30))
    (folder / "samples/images").mkdir(parents=True)
    for place, preference in enumerate(preferences):
        record = {
            **{"iteration": place, "kind": "image", "prompts": ["a cat"] * 30, "details": {}},
            "rewards": list(5 + place / 10 + noise[0, place]),
            "holdout_rewards": list(preference + noise[1, place]),
        }
        (folder / f"samples/images/iteration_{place:04d}.json").write_text(json.dumps(record), "utf-8")
    (folder / "summary.json").write_text(json.dumps({"reward_queries": 1440}), "utf-8")


def make_evaluation(folder, scores):
    names = ("aesthetic", "tiny_preference", "tiny_reader")
    results = [
        {"reward": name, "strength": strength, "score": {"mean": mean}}
        for strength, means in scores.items()
        for name, mean in zip(names, means, strict=True)
    ]
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"results": results}), "utf-8")


def test_tables_and_figure_are_those_of_the_runs(script, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "aesthetic-none-7", PREFERENCES)
    make_run(tmp_path / "aesthetic-kl-7", PREFERENCES[:11])
    weaker = {strength: (6.0, 5.0 + strength, 0.5) for strength in (0.0, 0.25, 0.5, 0.75, 1.0)}
    make_evaluation(tmp_path / "aesthetic-none-7-evaluation", weaker)
    make_evaluation(tmp_path / "aesthetic-none-7-best-evaluation", {0.0: (6, 5, 1), 1.0: (6.5, 6.25, 0.75)})
    make_evaluation(tmp_path / "aesthetic-kl-7-evaluation", {0.0: (6, 5, 1), 1.0: (6.25, 5.75, 0.8)})
    monkeypatch.setattr("sys.argv", ["over_optimisation.py", "--only-draw", "--seeds", "7", "--output", str(tmp_path)])
    script.main()
    printed = capsys.readouterr().out.splitlines()
    (row,) = (line for line in printed if line.startswith("| 7 | 10 | "))
    stopped = int(row.split(" | ")[2])
    assert 10 < stopped <= 13
    assert row.endswith("| 100% |")
    assert "| pretrained | 0 | 6.00 | 5.00 | 5.00 | 50% |" in printed
    assert "| last, strength 0.5 | 1,440 | 6.00 | 5.50 | 5.50 | 50% |" in printed
    assert f"| best of the run | {72 * stopped:,} | 6.50 | 6.25 | 6.25 | 75% |" in printed
    assert "| kl | 1,440 | 6.25 | 5.75 | 5.75 | 80% |" in printed
    assert (tmp_path / "images/over_optimisation.png").is_file()


def test_run_that_is_not_over_optimised_is_not_stopped(script, tmp_path):
    make_run(tmp_path / "run", np.linspace(5, 6, 21))
    run = script.braked(tmp_path / "run")
    assert (run.stop, run.reason) == (20, None)
    assert run.gain_left(20) == pytest.approx(1, abs=0.05)


def test_every_run_has_its_evaluations(script, tmp_path):
    arguments = script.Arguments(seeds=(3,), output=tmp_path)
    trained = {folder.name: command for command, folder in script.trainings(arguments)}
    assert set(trained) == {"aesthetic-none-3", "aesthetic-kl-3"}
    assert "--kl-coef" not in trained["aesthetic-none-3"]
    evaluated = {folder.name: command for command, folder in script.evaluations(arguments)}
    assert set(evaluated) == {f"aesthetic-{name}-3-evaluation" for name in ("none", "kl")} | {
        "aesthetic-none-3-best-evaluation"
    }
    command = evaluated["aesthetic-none-3-evaluation"]
    assert command[command.index("--strengths") + 1 :][:4] == ["0.25", "0.5", "0.75", "1.0"]
