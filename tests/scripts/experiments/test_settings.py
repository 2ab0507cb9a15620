"""The contenders of `scripts/experiments/settings.py`, and how it counts reward queries."""

import csv
import sys

import pytest
from PIL import Image


@pytest.fixture
def script(scripts_on_path):
    import settings

    return settings


def rows(script, contender, seed, rewards, rate="0.001"):
    values = [(contender, str(seed), rate, str(at), str(72 * at), str(reward)) for at, reward in enumerate(rewards)]
    return [dict(zip(script.FIELDS, one, strict=True)) for one in values]


def test_every_contender_is_a_valid_configuration(script, tmp_path):
    arguments = script.Arguments()
    for contender in script.CONTENDERS:
        config = script.configuration(arguments, script.Run(contender, 3, 2e-3, 5), tmp_path)
        config.resolved()
        assert (config.learning_rate, config.iterations, config.seed) == (2e-3, 5, 3)


def test_contenders_differ_as_their_names_say(script, tmp_path):
    arguments = script.Arguments()
    made = {name: script.configuration(arguments, script.Run(name, 0, None, 5), tmp_path) for name in script.CONTENDERS}
    steps = {name: config.trained_steps for name, config in made.items()}
    assert (steps["defaults"], steps["trl"], steps["all_but_last_step"], steps["fifth_of_steps"]) == (5, 10, 9, 2)
    assert made["trl"].optimizer.learning_rate_schedule == "constant"
    assert (
        made["trl_our_adapters"].policy.lora_rank == made["defaults"].policy.lora_rank != made["trl"].policy.lora_rank
    )
    assert made["guided"].policy.guidance_scale == made["guided_half_gradient"].policy.guidance_scale > 1
    assert made["guided"].policy.unconditional_gradient
    assert not made["guided_half_gradient"].policy.unconditional_gradient


def test_queries_are_those_before_the_first_evaluation_that_is_good_enough(script):
    falling = [(0, -2.0), (72, -1.6), (144, -1.5), (216, -1.7)]
    assert script.queries_to(falling, 0.25) == 144
    assert script.queries_to(falling, 0.26) is None
    assert script.queries_to([(0, 2.0), (72, 2.6)], 0.25) == 72  # a reward above 0


def test_search_takes_the_best_rate_of_the_whole_runs(script):
    found = [
        *rows(script, "trl", 100, [-2, -1.5, -1.4], "0.005"),
        *rows(script, "trl", 100, [-2, -1.2, -1.6], "0.01"),
        *rows(script, "trl", 100, [-2, -1.0], "0.02"),
    ]
    assert script.best_rates(found) == {"trl": (0.005, -1.4)}


def test_report_prints_and_plots_the_rows_of_the_table(script, tmp_path, monkeypatch, capsys):
    held = [
        *rows(script, "defaults", 0, [-2, -1.4, -1.3]),
        *rows(script, "defaults", 1, [-2, -1.6, -1.3]),
        *rows(script, "trl", 0, [-2, -1.9, -1.4]),
        *rows(script, "trl", 1, [-2, -1.9, -1.8]),
    ]
    with (tmp_path / "reward-queries.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, script.FIELDS)
        writer.writeheader()
        writer.writerows(held)
    monkeypatch.setattr(sys, "argv", ["settings.py", "--stage", "report", "--output", str(tmp_path)])
    script.main()
    printed = capsys.readouterr().out
    assert "| defaults | 0.001 | 72, 144 | 108 | -1.300, -1.300 |" in printed
    assert "| trl | 0.001 | 144, not in 144 | not all in 144 | -1.400, -1.800 |" in printed
    assert Image.open(tmp_path / "images" / "reward_queries.png").size[0] > 300


def test_training_gives_one_row_per_evaluation(script, micro_pipeline_folder):
    arguments = script.Arguments(model=str(micro_pipeline_folder), eval_samples=2)
    found = script.train(arguments, script.Run("trl", 3, 1e-3, 1))
    assert [(row["iteration"], row["reward_queries"]) for row in found] == [("0", "0"), ("1", "72")]
    assert found[0]["eval_reward"] != found[1]["eval_reward"]


def test_unknown_contender_is_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["settings.py", "--contenders", "sac"])
    with pytest.raises(SystemExit, match="contenders must be among defaults, trl, .*; got sac"):
        script.main()


def test_runs_that_are_in_the_table_are_named_and_not_repeated(script, tmp_path, monkeypatch, capsys):
    """Else the table of docs/, printed in a second, would look like a measurement."""
    monkeypatch.setattr(sys, "argv", ["settings.py", "--contenders=trl", "--seeds=0", f"--output={tmp_path}"])
    with (tmp_path / "reward-queries.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, script.FIELDS)
        writer.writeheader()
        writer.writerows(rows(script, "trl", 0, [-2, -1.4], rate="None"))
    script.main()
    assert f"1 of 1 runs are in {tmp_path / 'reward-queries.csv'} already" in capsys.readouterr().out
