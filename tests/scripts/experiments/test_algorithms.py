"""A miniature of `scripts/experiments/algorithms.py` and `points.py`."""

import csv
from itertools import product

import pytest
from helpers.scripts import run_script
from PIL import Image


def rows_of(results):
    """CSV rows: (protocol, algorithm, seed, learning rate, reward queries, reward)."""
    fields = ("protocol", "algorithm", "seed", "learning_rate", "reward_queries", "eval_reward")
    return [
        {**dict(zip(fields, map(str, row), strict=True)), "task": "aesthetic", "iteration": str(row[4] // 256)}
        for row in results
    ]


def write(file, fields, rows):
    with file.open("w", newline="") as table:
        writer = csv.DictWriter(table, fields)
        writer.writeheader()
        writer.writerows(rows)


def test_comparison_trains_every_algorithm(scripts_on_path, micro_pipeline_folder, monkeypatch):
    import algorithms as script

    monkeypatch.setattr(script, "SAMPLES", dict.fromkeys(script.SAMPLES, 8))
    arguments = script.Arguments(model=str(micro_pipeline_folder), eval_samples=2)
    for algorithm in script.LABELS:
        rows = script.train(arguments, script.Run("same_rate", algorithm, "incompressibility", 3, 1e-2, 8))
        assert [row["iteration"] for row in rows] == ["0", "1"]
        assert [row["reward_queries"] for row in rows] == ["0", "8"]
        assert all(float(row["eval_reward"]) > 0 for row in rows)
        assert rows[0]["eval_reward"] != rows[1]["eval_reward"]


def test_run_with_the_same_rate_is_not_trained_for_the_best_one_too(scripts_on_path, tmp_path):
    import algorithms as script

    file = tmp_path / "rows.csv"
    write(file, script.FIELDS, rows_of([("same_rate", "ppo", 0, 0.002, queries, 1.5) for queries in (0, 2048)]))
    run = script.Run("best_rate", "ppo", "aesthetic", 0, 0.002, 2048)
    others = [run._replace(learning_rate=0.005), run._replace(seed=1), run._replace(queries=4096)]
    for _ in range(2):  # nothing is added twice
        script.reuse([run, *others], file)
    rows = [row for row in script.read_rows(file) if row["protocol"] == "best_rate"]
    assert rows == rows_of([("best_rate", "ppo", 0, 0.002, queries, 1.5) for queries in (0, 2048)])


def test_settings_of_every_run_are_valid(scripts_on_path, tmp_path):
    import algorithms as script

    arguments = script.Arguments()
    for task, algorithm in product(arguments.tasks, script.LABELS):
        run = script.Run("same_rate", algorithm, task, 0, 2e-3, 2048)
        config = script.configuration(arguments, run, tmp_path / "run").resolved()
        assert config.total_iterations * script.SAMPLES[algorithm] == 2048


def test_search_takes_the_best_last_reward_of_each_task(scripts_on_path, tmp_path):
    import algorithms as script

    file = tmp_path / "rates.csv"
    results = [
        ("tuning", "ppo", 100, 0.001, 2048, 1.5),
        ("tuning", "ppo", 100, 0.002, 1024, 9.9),  # on the way
        ("tuning", "ppo", 100, 0.002, 2048, 1.7),
        ("tuning", "ppo", 100, 0.01, 2048, float("-inf")),
        ("tuning", "rwr", 100, 0.001, 2048, 1.4),
    ]
    write(file, script.FIELDS, rows_of(results))
    assert script.best_rates(file) == {("ppo", "aesthetic"): 0.002, ("rwr", "aesthetic"): 0.001}


def test_search_and_comparison_run_in_a_new_folder_and_are_not_repeated(scripts_on_path, tmp_path, monkeypatch, capsys):
    import algorithms as script

    trained = []

    def train_here(runs, train, file, fields, key, jobs):
        done = {tuple(row[name] for name in fields[:key]) for row in script.read_rows(file)}
        new = [run for run in runs if tuple(map(str, run[:key])) not in done]
        trained.extend(new)
        old = script.read_rows(file)
        rows = [
            dict(zip(fields, [*map(str, run[:key]), "1", "256", str(run.learning_rate + run.seed)], strict=True))
            for run in new
        ]
        write(file, fields, old + rows)

    monkeypatch.setattr(script, "perform", train_here)
    arguments = ["--output", tmp_path, "--tasks", "aesthetic", "--learning-rates", "0.1", "0.2", "--algorithms", "ppo"]
    monkeypatch.setattr("sys.argv", ["algorithms.py", *map(str, arguments), "--same-rate", "0.15"])
    script.main()
    compared = [(run.protocol, run.seed, run.learning_rate) for run in trained]
    assert compared == [
        *(("same_rate", seed, 0.15) for seed in (0, 1, 2)),
        *(("tuning", 100, rate) for rate in (0.1, 0.2)),
        *(("best_rate", seed, 0.2) for seed in (0, 1, 2)),
    ]
    trained.clear()
    script.main()
    assert trained == []
    seeds = "0.200, 1.200, 2.200"
    assert f"| best_rate | aesthetic | DDPO-IS | 0.2 | {seeds} | {seeds} | 1.200 |" in capsys.readouterr().out


def test_comparison_is_plotted_from_its_table(scripts_on_path, tmp_path, monkeypatch, capsys):
    import algorithms as script

    results = [("same_rate", "ppo", seed, 0.001, 256, -1 - seed / 10) for seed in (0, 1, 2)]
    write(tmp_path / "algorithms.csv", script.FIELDS, rows_of(results))
    run_script("experiments/algorithms", ["--only-plot", "--output", tmp_path], monkeypatch)
    assert Image.open(tmp_path / "images" / "algorithms.png").size[0] > 300
    table = capsys.readouterr().out
    seeds = "-1.000, -1.100, -1.200"
    assert f"| same_rate | aesthetic | DDPO-IS | 0.001 | {seeds} | {seeds} | -1.100 |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithms", "sac"], "algorithms must be among ppo, reinforce, rwr, rwr_sparse; got sac"),
        (["--only-plot"], "output must be a folder with a file algorithms.csv"),
        (["--tuning-seed", "1"], "tuning_seed must not be one of the seeds; got 1"),
    ],
)
def test_comparison_refuses(scripts_on_path, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run_script("experiments/algorithms", [*arguments, "--output", tmp_path], monkeypatch)


def test_points_are_trained_and_plotted(tmp_path, monkeypatch, capsys):
    plot = tmp_path / "points.png"
    run_script("experiments/points", ["--iterations", 2, "--samples", 32, "--output", plot], monkeypatch)
    assert Image.open(plot).size[0] > 300
    shown = capsys.readouterr().out
    assert "points_ring: " in shown
    assert "points_mixture: " in shown
