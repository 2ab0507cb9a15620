"""A miniature of `scripts/experiments/algorithms.py` and `points.py`."""

import csv

import pytest
from helpers.scripts import run_script
from PIL import Image


def rows_of(results):
    """CSV rows: (algorithm, seed, learning rate, updates, iteration, reward)."""
    fields = ("algorithm", "seed", "learning_rate", "updates", "iteration", "eval_reward")
    return [
        {**dict(zip(fields, map(str, row), strict=True)), "reward": "jpeg_compressibility", "reward_queries": "72"}
        for row in results
    ]


def write(file, fields, rows):
    with file.open("w", newline="") as table:
        writer = csv.DictWriter(table, fields)
        writer.writeheader()
        writer.writerows(rows)


def test_comparison_trains_every_algorithm(scripts_on_path, micro_pipeline_folder):
    import algorithms as script

    arguments = script.Arguments(model=str(micro_pipeline_folder), eval_samples=2, eval_interval=0)
    for algorithm in script.LABELS:
        rows = script.train(arguments, script.Run(algorithm, "jpeg_compressibility", 3, 1e-2, 1, 1))
        assert [row["iteration"] for row in rows] == ["0", "1"]
        assert [row["reward_queries"] for row in rows] == ["0", "72"]
        assert all(float(row["eval_reward"]) < 0 for row in rows)
        assert rows[0]["eval_reward"] != rows[1]["eval_reward"]


def test_search_takes_the_best_last_reward(scripts_on_path, tmp_path):
    import algorithms as script

    file = tmp_path / "rates.csv"
    results = [
        ("ppo", 100, 0.001, 4, 8, -1.5),
        ("ppo", 100, 0.002, 2, 8, -1.2),
        ("ppo", 100, 0.002, 2, 4, -0.1),  # on the way
        ("ppo", 100, 0.01, 4, 8, float("-inf")),
        ("rwr", 100, 0.001, 1, 8, -1.4),
    ]
    write(file, script.FIELDS, rows_of(results))
    assert script.best_settings(file) == {"ppo": (0.002, 2, -1.2), "rwr": (0.001, 1, -1.4)}


def test_comparison_is_plotted_from_its_table(scripts_on_path, tmp_path, monkeypatch, capsys):
    import algorithms as script

    results = [("ppo", seed, 0.001, 4, 1, -1 - seed / 10) for seed in (0, 1, 2)]
    write(tmp_path / "algorithms.csv", script.FIELDS, rows_of(results))
    run_script("experiments/algorithms", ["--stage", "plot", "--output", tmp_path], monkeypatch)
    assert Image.open(tmp_path / "images" / "algorithms.png").size[0] > 300
    assert "| DDPO-IS | -1.000 | -1.000, -1.100, -1.200 | -1.100 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithms", "sac"], "algorithms must be among ppo, reinforce, rwr, rwr_sparse; got sac"),
        (["--stage", "compare"], "has no learning rate of ppo, reinforce, rwr, rwr_sparse: run --stage tune first"),
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
