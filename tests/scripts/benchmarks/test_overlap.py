"""The benchmark of a slow reward."""

import re

import pytest


@pytest.mark.parametrize("overlap", ["overlap", "no-overlap"])
def test_a_slow_reward_is_compared_with_an_instant_one(overlap, micro_pipeline_folder, monkeypatch, capsys):
    import overlap as script

    sizes = ["--samples=4", "--batches=2", "--num-inference-steps=2", "--repeats=1", "--device=cpu"]
    monkeypatch.setattr("sys.argv", ["overlap.py", *sizes, f"--model={micro_pipeline_folder}", f"--{overlap}"])
    assert script.main() == 0
    shown = capsys.readouterr().out
    assert f"2 batches of 2 images, overlap {'on' if overlap == 'overlap' else 'off'}" in shown
    assert re.search(r"an iteration takes \d+\.\d+ times as long \(median of 1\)", shown)
