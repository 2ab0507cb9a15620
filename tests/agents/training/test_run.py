"""A run as an object: whom it tells what, and when."""

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


def test_listeners_are_told_of_every_iteration_before_it_is_logged(micro_pipeline_folder, tmp_path):
    run = prepare_run(micro_config(micro_pipeline_folder, tmp_path, eval_interval=0, eval_samples=2))
    diary = Diary()
    run.listeners.append(diary)
    run.train()
    expected = [("start", 0), ("iteration", 1), ("iteration", 2), ("iteration", 3), ("end", 3)]
    assert diary.moments == expected
    assert [row["diary/iteration"] for row in rows(tmp_path)] == ["", "1", "2", "3"], "in the iteration's own row"


def test_evaluations_stand_in_the_row_of_their_iteration(micro_pipeline_folder, tmp_path):
    run = prepare_run(micro_config(micro_pipeline_folder, tmp_path, eval_interval=2, eval_samples=2))
    run.train()
    assert [iteration for iteration, _ in run.evaluations] == [0, 2, 3]
    table = {int(row["time/iterations"] or 0): row["eval/reward_mean"] for row in rows(tmp_path)}
    for iteration, mean in run.evaluations:
        assert float(table[iteration]) == mean
    assert table[1] == ""
