"""The share of the monitors is measured: every part takes time, and the monitors are a part of the evaluation."""

from itertools import count
from types import SimpleNamespace


def test_monitors_are_a_part_of_the_evaluation(micro_pipeline_folder, tmp_path, monkeypatch):
    import monitor_share

    ticks = SimpleNamespace(process_time=count().__next__)  # a call takes as long as it reads the clock
    monkeypatch.setattr(monitor_share, "time", ticks)
    arguments = monitor_share.Arguments(
        model=str(micro_pipeline_folder), samples=4, num_inference_steps=2, eval_samples=4, iterations=1
    )
    seconds = monitor_share.measure(arguments, tmp_path)
    assert 0 < seconds["monitors"] < seconds["evaluation"]
    assert 0 < seconds["drift"] < seconds["iteration"]
