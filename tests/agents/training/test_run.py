"""A run as an object: whom it tells what, and when."""

import pytest
from helpers.micro_agents import micro_config
from helpers.run_comparison import rows

from agents import RunListener, prepare_run


class Diary(RunListener):
    """Notes every moment with the iterations that are done, and records a metric."""

    def __init__(self):
        self.moments = []

    def on_start(self, run):
        self.moments.append(("start", run.iteration))

    def on_iteration(self, run):
        self.moments.append(("iteration", run.iteration))
        run.algorithm.logger.record("diary/iteration", run.iteration)

    def on_end(self, run):
        self.moments.append(("end", run.iteration))


def test_listeners_are_told_of_every_iteration_before_it_is_logged(tmp_path):
    run = prepare_run(micro_config("points", tmp_path, eval_interval=0, eval_samples=2))
    diary = Diary()
    run.listeners.append(diary)
    run.train()
    expected = [("start", 0), ("iteration", 1), ("iteration", 2), ("iteration", 3), ("end", 3)]
    assert diary.moments == expected
    assert [row["diary/iteration"] for row in rows(tmp_path)] == ["", "1", "2", "3"], "in the iteration's own row"


def test_evaluations_stand_in_the_row_of_their_iteration(tmp_path):
    run = prepare_run(micro_config("points", tmp_path, eval_interval=2, eval_samples=2))
    run.train()
    assert [iteration for iteration, _ in run.evaluations] == [0, 2, 3]
    table = {int(row["time/iterations"] or 0): row["eval/reward_mean"] for row in rows(tmp_path)}
    for iteration, mean in run.evaluations:
        assert float(table[iteration]) == mean
    assert table[1] == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iteration", -1),
        ("iteration", 1.5),
        ("iteration", True),
        ("iteration", 2),
        ("training_rewards", [float("nan")]),
        ("training_rewards", ["1"]),
        ("training_rewards", []),
        ("evaluations", [[2, 0.5]]),
        ("evaluations", [[0, float("inf")]]),
        ("evaluations", [[0]]),
        ("holdout_evaluations", [[2, 0.5]]),
        ("holdout_evaluations", [[0, float("nan")]]),
        ("stopped_early", 3),
        ("pretrained_std", -1.0),
        ("pretrained_std", float("nan")),
    ],
)
def test_state_that_no_run_has_is_refused_and_changes_nothing(tmp_path, name, value):
    run = prepare_run(micro_config("points", tmp_path))
    state = {
        "iteration": 1,
        "training_rewards": [0.5],
        "evaluations": [[0, 0.25]],
        "holdout_evaluations": [],
        "stopped_early": None,
        "pretrained_std": 0.1,
    }
    run.load_state_dict(state)
    before = run.state_dict()
    with pytest.raises(
        (ValueError, TypeError), match=r"(iteration|training_rewards|evaluations|stopped_early|pretrained_std).* must"
    ):
        run.load_state_dict({**state, "iteration": 1, name: value})
    assert run.state_dict() == before
