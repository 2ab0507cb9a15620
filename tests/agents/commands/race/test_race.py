"""Whole races on points: who wins, what a race leaves, how it stops and goes on, and what it refuses."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import write_numbers
from filelock import FileLock
from helpers import micro_agents
from helpers.micro_agents import brightness
from helpers.paths import SCRIPTS

from agents.commands.race import runs
from agents.commands.race.command import main
from agents.commands.race.state import RaceState
from agents.config.command_line import parse_command_line
from agents.config.train_config import TrainConfig
from agents.training.preparation import run_training

BASE = [
    "--model=points",
    "--reward=helpers.micro_agents:brightness",
    "--lora-rank=0",
    "--guidance-scale=1",
    "--num-inference-steps=3",
    "--samples-per-iteration=8",
    "--sample-batch-size=4",
    "--samples-per-prompt=2",
    "--updates-per-iteration=1",
    "--stat-min-count=2",
    "--eval-samples=6",
    "--checkpoint-interval=0",
    "--device=cpu",
]
CONTENDERS = """
contenders:
  ppo: {learning_rate: [1e-4, 1e-2]}
  sf: {algorithm: reinforce, samples_per_iteration: 16, learning_rate: 1e-3}
  wild: {learning_rate: 1e4}
"""


@pytest.fixture
def race(tmp_path, monkeypatch, capsys):
    """Run the command in a folder; return its exit code, and what it printed and wrote to standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agents.evaluation.plots.write_figure", write_numbers)
    monkeypatch.setattr(micro_agents, "brightness", careful)

    def run(*arguments, contenders=CONTENDERS, budget=32, seeds=(0, 1)):
        (tmp_path / "four.yaml").write_text(contenders)
        own = ["--contenders=four.yaml", f"--budget={budget}", "--reduction=2", "--seeds", *map(str, seeds)]
        monkeypatch.setattr(sys, "argv", ["ddpo-race", *BASE, *own, *map(str, arguments)])
        capsys.readouterr()
        code = main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def table_in(printed):
    """The last table that was printed."""
    return printed[printed.rindex("contender ") :].partition("\n\n")[0]


def careful(images, prompts, metadata):
    """Brightness, but no score for what no sane policy generates."""
    if np.abs(images).max() > 1000:
        raise ValueError("a point is out of sight")
    return brightness(images, prompts, metadata)


class Fails:
    """The same, but its `n`-th call raises an error."""

    __name__ = "careful"

    def __init__(self, n, error):
        self.left = n
        self.error = error

    def __call__(self, images, prompts, metadata):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return careful(images, prompts, metadata)


def test_race_has_a_winner_that_trains_on_and_resumes_bit_for_bit(race, tmp_path, monkeypatch):
    """One test, because each needs the race that nothing stopped."""
    code, printed, _ = race("--output=whole")
    assert code == 0
    whole = tmp_path / "whole"
    state = json.loads((whole / "race.json").read_text())
    first = {one["contender"]: one["iterations"] for one in state["results"] if one["rung"] == 0}
    assert first == {"ppo-0.0001": 2, "ppo-0.01": 2, "sf": 1}  # 16 queries each
    final = [one for one in state["results"] if one["rung"] == 1]
    assert len(final) == 4  # two contenders with two seeds
    assert all(one["iterations"] == 2 * first[one["contender"]] for one in final)

    # the ranking is that of the runs' own last evaluations
    means = {}
    for one in final:
        folder = whole / "contenders" / one["contender"] / f"seed-{one['seed']}"
        assert json.loads((folder / "summary.json").read_text())["reward_after"] == one["reward"]
        means.setdefault(one["contender"], []).append(one["reward"] / 2)
    winner = max(means, key=lambda name: sum(means[name]))
    rows = [line.split() for line in table_in(printed).splitlines()[1:]]
    assert rows[0][:2] == ["1", winner]
    assert rows[0][-1] == "winner"
    assert f"{sum(means[winner]):.4f}" in rows[0]

    # the contender that failed is out, with its reason
    (failure,) = state["failures"]
    assert (failure["contender"], failure["rung"]) == ("wild", 0)
    assert rows[-1][:2] == ["-", "wild"]
    assert failure["reason"] in table_in(printed)
    assert not any(one["contender"] == "wild" and one["rung"] for one in state["results"])

    # the learning rate falls over the whole budget, whatever the rung
    loser = next(one["contender"] for one in state["results"] if one["contender"] not in {*means, "wild"})
    config = TrainConfig.read(whole / "contenders" / loser / "seed-0")
    assert config.schedule_length == 2 * config.total_iterations

    # the command that was printed trains the winner as its run in the race did
    command = shlex.split(printed.splitlines()[-1])
    assert command[:3] == ["ddpo-train", "--config", str(whole / "config.yaml")]
    config = parse_command_line(command[1:]).config
    again = run_training(config.changed(run_dir=tmp_path / "again"))
    assert again.reward_after == next(o["reward"] for o in final if o["contender"] == winner and o["seed"] == 0)
    assert (whole / "race.png").is_file()

    # stopped by Ctrl-C, and by a failing machine that is no contender's fault
    for call, error, expected in ((4, KeyboardInterrupt(), 130), (67, ConnectionError("the judge has left"), 1)):
        monkeypatch.setattr(micro_agents, "brightness", Fails(call, error))
        code, stopped, shown = race("--output=stopped")
        assert code == expected
        assert "the same command" in stopped
        assert str(error) in shown
    done = json.loads((tmp_path / "stopped" / "race.json").read_text())
    assert len(done["results"]) > len(first) * 2  # it stopped in the second rung
    assert len(done["results"]) < len(state["results"])
    monkeypatch.setattr(micro_agents, "brightness", careful)
    code, resumed, _ = race("--output=stopped")
    assert code == 0
    assert table_in(resumed) == table_in(printed)
    assert (tmp_path / "stopped" / "race.json").read_bytes() == (whole / "race.json").read_bytes()
    for name in ("race.png", "config.yaml"):
        assert (tmp_path / "stopped" / name).read_bytes() == (whole / name).read_bytes()

    # a race that is over says so again, and trains nothing; another race does not get its folder
    monkeypatch.setattr(micro_agents, "brightness", Fails(1, AssertionError("nothing is scored")))
    code, over, _ = race("--output=whole")
    assert (code, table_in(over)) == (0, table_in(printed))
    code, _, error = race("--output=whole", "--clip-range=0.5")
    assert code == 2
    assert re.search(r"holds another race, with contenders.ppo-0.0001.clip_range=0.003 instead of 0.5", error)


def test_seconds_are_timed_once_and_buy_iterations(race, tmp_path, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(runs, "perf_counter", lambda: float(next(ticks)))  # an iteration takes a second
    code, printed, _ = race(
        "--output=timed",
        "--budget-unit=seconds",
        "--holdout-reward=helpers.micro_agents:brightness:1:raw",
        contenders="contenders: {a: {}, slow: {samples_per_iteration: 16}}",
        budget=3.5,
        seeds=(0,),
    )
    assert code == 0
    state = json.loads((tmp_path / "timed" / "race.json").read_text())
    assert state["seconds"] == {"a": 1.0, "slow": 1.0}
    assert [one["iterations"] for one in state["results"]] == [3, 3]
    assert all(one["holdout_reward"] == pytest.approx(one["reward"]) for one in state["results"])
    assert "helpers.micro_agents:brightness" in table_in(printed)
    assert not (tmp_path / "timed" / "timing").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget=20"], r"budget must be at least 32 for contender 'sf', .* 16 queries: rung 1 of 2 has 10"),
        (["--reduction=1"], r"reduction must be in \[2, "),
        (["--seeds", "1", "1"], "seeds must be different numbers"),
        (["--final-seeds", "2", "2"], "final_seeds must be different numbers; got .2, 2."),
        (["--updates-per-iteration=3"], "updates_per_iteration.*of contender 'ppo-0.0001'"),
        (["--reward=helpers.stateful_rewards:Remembering"], "no common scale.*name:weight:raw"),
        (["--contenders=absent.yaml"], "absent.yaml"),
        (
            ["--holdout-reward=helpers.micro_agents:brightness:1:raw", "--stop-at-overoptimisation"],
            "stop_at_overoptimisation must be False in a race.*got True .of contender 'ppo-0.0001'",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(race, tmp_path, arguments, message):
    code, _, error = race(*arguments)
    assert code == 2
    assert re.search(message, " ".join(error.split())), error
    assert {path.name for path in tmp_path.iterdir()} == {"four.yaml"}


def test_what_runs_print_is_in_the_log_alone(race, tmp_path, monkeypatch):
    def chatty(images, prompts, metadata):
        print("scoring, said the reward")
        print("careful, said the reward", file=sys.stderr)
        return brightness(images, prompts, metadata)

    monkeypatch.setattr(micro_agents, "brightness", chatty)
    code, printed, error = race("--output=logged", contenders="contenders: {a: {}}", seeds=(0,))
    assert (code, error) == (0, "")
    assert "said the reward" not in printed
    log = (tmp_path / "logged" / "log.txt").read_text()
    assert log.startswith("rung 1 of 1, a, seed 0\n")
    assert "scoring, said the reward" in log
    assert "careful, said the reward" in log


def test_dry_run_prints_the_iterations_and_writes_nothing(race, tmp_path):
    code, printed, _ = race("--dry-run", budget=40)
    assert code == 0
    assert re.search(r"ppo-0.01 +2, 5  \(16, 40 queries\)", printed)
    assert re.search(r"sf +1, 2  \(16, 32 queries\)", printed)
    assert {path.name for path in tmp_path.iterdir()} == {"four.yaml"}


def test_the_last_rung_can_have_seeds_of_its_own(race, tmp_path):
    contenders = (
        "contenders: {a: {learning_rate: 1e-4}, b: {learning_rate: 1e-3}, c: {learning_rate_schedule: constant}}"
    )
    settings = ("--output=own", "--final-seeds", 0, 1)
    code, printed, _ = race(*settings, contenders=contenders, seeds=(7,))
    assert code == 0
    assert "3 contenders with seed 7, to 16 queries of a run" in printed
    assert "2 contenders with seeds 0, 1, to 32 queries of a run" in printed
    results = json.loads((tmp_path / "own" / "race.json").read_text())["results"]
    assert [one["seed"] for one in results if one["rung"] == 0] == [7, 7, 7]
    final = [one for one in results if one["rung"] == 1]
    assert [(one["seed"], one["iterations"]) for one in final] == [(0, 4), (1, 4)] * 2
    rows = [line.split() for line in table_in(printed).splitlines()[1:]]
    assert "to" in rows[0]  # the range over two seeds
    assert "to" not in rows[2]  # one seed
    winner = rows[0][1]
    assert "\nseed: 0\n" in (tmp_path / "own" / "config.yaml").read_text()
    assert f"contenders/{winner}/seed-0" in printed


def test_settings_are_checked_with_the_iterations_of_every_rung(race, tmp_path, monkeypatch):
    resolved = TrainConfig.resolved

    def refuse(config, processes=1):
        if config.iterations == 4:
            raise ValueError("iterations must not be 4")
        return resolved(config, processes)

    monkeypatch.setattr(TrainConfig, "resolved", refuse)
    code, _, error = race()
    assert code == 2
    assert "iterations must not be 4 (of contender 'ppo-0.0001')" in " ".join(error.split())
    assert {path.name for path in tmp_path.iterdir()} == {"four.yaml"}


def test_traceback_of_a_contender_that_cannot_be_prepared_is_in_the_log(race, tmp_path, monkeypatch):
    prepare_run = runs.prepare_run

    def prepare(config, processes):
        if config.learning_rate == 1e4:
            raise ValueError("there is no such layer")
        return prepare_run(config, processes)

    monkeypatch.setattr(runs, "prepare_run", prepare)
    contenders = "contenders: {a: {}, b: {learning_rate: 1e-4}, wild: {learning_rate: 1e4}}"
    code, printed, _ = race("--output=log", "--reduction=3", contenders=contenders, budget=8)
    assert code == 0
    log = (tmp_path / "log" / "log.txt").read_text()
    assert "rung 1, wild, seed 0 failed:\nTraceback (most recent call last):\n" in log
    assert log.rstrip().endswith("ValueError: there is no such layer")

    # a contender has a place once it has trained with every seed
    lines = [line for line in printed.splitlines() if line.startswith("rung 1 ")]
    assert ["place" in line for line in lines] == [False, False, True, False, True, False]
    assert lines[2].endswith(", place 1 of 1 so far")
    assert lines[4].endswith((", place 1 of 2 so far", ", place 2 of 2 so far"))


def test_a_folder_belongs_to_one_race(race, tmp_path):
    (tmp_path / "mine").mkdir()
    with FileLock(tmp_path / "mine" / ".lock"):
        code, _, error = race("--output=mine")
    assert code == 1
    assert "is in use by another process" in error
    (tmp_path / "mine" / "config.yaml").touch()
    code, _, error = race("--output=mine")
    assert code == 2
    assert re.search("output must be a new folder, or that of a race; .* has 'config.yaml'", error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [content], "must be an object"),
        (lambda content: content | {"version": 7}, "version must be 1; got 7"),
        (lambda content: content | {"more": 0}, "must hold version, race, seconds, results and failures"),
        (lambda content: content | {"results": [{"contender": "a"}]}, "missing"),
        (lambda content: content | {"seconds": {"a": -1.0}}, "seconds of a must be above 0"),
        (
            lambda content: content | {"failures": [{"contender": "b", "rung": 0, "reason": ""}]},
            "'b' is no contender|reason",
        ),
        (
            lambda content: content | {"race": {"contenders": {"a": {"lora_rank": 3}}}},
            "contenders.a.lora_rank=3 instead of 2",
        ),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, change, message):
    path, description = tmp_path / "race.json", {"contenders": {"a": {"lora_rank": 2}}}
    RaceState(description).write(path)
    assert RaceState.read(path, description).results == []
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        RaceState.read(path, description)


@pytest.mark.slow
def test_two_processes_drop_a_contender_together_and_go_on(tmp_path):
    (tmp_path / "two.yaml").write_text("contenders: {ppo: {learning_rate: [1e-3, 1e-2]}, wild: {learning_rate: 1e3}}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    own = ["--contenders=two.yaml", "--budget=256", "--reduction=2", "--output=two", "--reward=points_ring"]
    sizes = ["--samples-per-iteration=64", "--sample-batch-size=64", "--updates-per-iteration=4"]
    done = subprocess.run(
        [*command, str(SCRIPTS / "race.py"), *BASE, *own, *sizes], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "two" / "race.json").read_text())
    assert [failure["contender"] for failure in state["failures"]] == ["wild"]
    assert [one["contender"] for one in state["results"]] == ["ppo-0.001", "ppo-0.01"] * 2
    assert done.stdout.count("winner") == 1  # one process prints
