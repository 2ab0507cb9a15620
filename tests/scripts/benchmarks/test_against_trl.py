"""The comparison with TRL: the work of both trainers, and the model that both read."""

from pathlib import Path

import pytest


def test_both_are_given_the_same_work():
    import against_trl

    arguments = against_trl.Arguments(against=Path("python"), model="folder", ours="--train-batch-size=16")
    commands = against_trl.commands(arguments)
    ours, theirs = (set(commands[name][2:]) for name in ("ours", "trl"))
    assert theirs <= ours
    assert ours - theirs == {"--lora-targets=attention", "--timestep-window", "0", "1", "--train-batch-size=16"}
    assert {"--samples=32", "--num-inference-steps=20", "--guidance-scale=5.0", "--lora-rank=4"} <= theirs


def test_the_comparison_writes_the_folder_that_trl_needs(small_architecture, monkeypatch, capsys, tmp_path):
    import against_trl

    against = {"against": Path("python")}
    seen = []

    def compare(arguments):
        seen.append(Path(arguments.model))
        assert (seen[-1] / "model_index.json").is_file()
        return {}

    monkeypatch.setattr(against_trl, "_compare", compare)
    kept = against_trl.Arguments(model="sd14-random", model_folder=tmp_path / "sd14", **against)
    assert against_trl.compare(kept) == {"model": "sd14-random"}
    against_trl.compare(kept)  # found again
    assert capsys.readouterr().err.count("writing sd14-random to") == 1
    against_trl.compare(against_trl.Arguments(model="sd14-random", **against))
    assert seen[:2] == [tmp_path / "sd14"] * 2
    assert not seen[2].exists(), "it was a temporary one"
    with pytest.raises(ValueError, match="model_folder is valid only with model sd14-random; got model 'tiny'"):
        against_trl.compare(against_trl.Arguments(model="tiny", model_folder=tmp_path, **against))
