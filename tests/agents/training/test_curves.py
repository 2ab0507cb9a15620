"""The curves of a run: one point an iteration in TensorBoard and `progress.csv`, each explained in the docs."""

import re
import shutil

import pytest
from helpers.micro_agents import micro_config, resume_config
from helpers.paths import ROOT
from helpers.run_comparison import rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.training.monitoring.divergence import has_diverged
from agents.training.preparation import run_training

DOCUMENTED = set(re.findall(r"`([a-z]+/[a-z_]+)`", (ROOT / "docs" / "training.md").read_text("utf-8")))


def curves(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def steps(curve):
    return [step for step, _ in curve]


def test_curves_have_the_iteration_as_x_axis(finished):
    shown = curves(finished.folder.path)
    assert steps(shown["eval/reward_mean"]) == [0, 2, 3], "before, during and after training"
    assert steps(shown["rollout/reward_mean"]) == steps(shown["train/loss"]) == [1, 2, 3]
    values = [value for _, value in shown["eval/reward_mean"]]
    assert values == pytest.approx([mean for _, mean in finished_evaluations(finished)], rel=1e-6)


def finished_evaluations(finished):
    table = [(int(row["time/iterations"]), row["eval/reward_mean"]) for row in rows(finished.folder.path)]
    return [(iteration, float(mean)) for iteration, mean in table if mean]


@pytest.mark.parametrize("lost", [1, 2])
def test_run_that_was_killed_after_its_log_has_each_point_once(whole, learner, tmp_path, lost):
    run_training(micro_config(learner, tmp_path))
    for iteration in range(4 - lost, 4):  # as if it had been killed before this checkpoint
        shutil.rmtree(tmp_path / "checkpoints" / f"iteration_{iteration:06d}")
    if lost == 2:
        run_training(micro_config(learner, tmp_path / "short", iterations=1, schedule_iterations=3))
        source = tmp_path / "short" / "checkpoints" / "iteration_000001"
        shutil.copytree(source, tmp_path / "checkpoints" / "iteration_000001")
    run_training(resume_config(tmp_path))
    expected = curves(whole.folder.path)
    for name, curve in curves(tmp_path).items():
        assert steps(curve) == steps(expected[name]), name
    assert [row["time/iterations"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]


def test_run_that_ends_sooner_than_planned_is_evaluated_in_its_own_row(learner, tmp_path):
    run_training(micro_config(learner, tmp_path, eval_interval=0))
    shutil.rmtree(tmp_path / "checkpoints" / "iteration_000003")  # as if it had been killed before this checkpoint
    (tmp_path / "summary.json").unlink()
    result = run_training(resume_config(tmp_path, iterations=2))
    assert result.iterations == 2
    table = rows(tmp_path)
    assert [row["time/iterations"] for row in table] == ["0", "1", "2"]
    assert float(table[2]["eval/reward_mean"]) == result.reward_after
    assert table[2]["train/loss"], "the row still has the iteration's metrics"
    assert steps(curves(tmp_path)["eval/reward_mean"]) == [0, 2]


VARIANTS = [
    {"critic": True, "advantage": "gae", "kl_coef": 0.1, "non_finite_rewards": "drop"},
    {"algorithm": "rwr", "kl_coef": 0.1},
    {"algorithm": "awm"},
    {"algorithm": "nft", "kl_coef": 0.1},
    {"autocast": "float16", "target_kl": 1.0},
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_logged_metric_is_documented(finished, micro_pipeline_folder, tmp_path, settings):
    run_training(micro_config(micro_pipeline_folder, tmp_path, iterations=1, eval_samples=2, **settings))
    logged = {name for folder in (tmp_path, finished.folder.path) for name in rows(folder)[0]} | set(curves(tmp_path))
    assert {name for name in logged if not name.startswith("reward/")} - DOCUMENTED == set()


def test_every_metric_in_the_code_is_documented():
    source = "".join(path.read_text("utf-8") for path in (ROOT / "agents").rglob("*.py"))
    named = set(re.findall(r'\.record\(\s*"(\w+/\w+)"', source))
    named |= {f"train/{name}" for name in re.findall(r'(?:metrics|logged)\["(\w+)"\]', source)}
    assert {"eval/reward_mean", "train/grad_norm", "train/overflowed_updates"} < named
    assert named - DOCUMENTED == set()


@pytest.mark.parametrize(
    ("rewards", "std", "expected"),
    [
        ([-4.2, -28800.0, -6.5, -4.3, -20.0, -17800.0, -354.0], 2.2, True),
        ([-4.2, -53.0, -4.1, -5.5, -6.5, -26.0, -5.3, -3.7], 2.2, False),  # points that recovered, learning rate 0.05
        ([0.0, -3.1, -3.1], 1.0, False),
        ([0.0, -3.1, -3.1, -3.1], 1.0, True),
        ([0.0, -2.9, -2.9, -2.9], 1.0, False),
        ([1.0, 0.9, 0.9, 0.9], 0.0, False),  # no scale
        ([0.0, 5.0, 9.0, 9.0], 1.0, False),
    ],
)
def test_rule_of_divergence(rewards, std, expected):
    assert has_diverged(rewards, std) is expected
