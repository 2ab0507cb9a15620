"""A miniature of `scripts/experiments/typographic_attack.py`, and what its pictures and figures mean."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from agents.evaluation.evaluate import Evaluation


@pytest.fixture
def script(scripts_on_path, monkeypatch):
    """Import the script, and draw a black square for every animal: the emoji font may not be installed."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    import typographic_attack
    from pretraining import emoji_renderings

    monkeypatch.setattr(emoji_renderings, "_sprite", lambda word: Image.new("RGBA", (20, 20), "black"))
    return typographic_attack


def test_captions_believe_the_digits_and_some_pictures_do_not(script):
    from digits.pictures import DIGITS, captioned_pictures

    pictures = captioned_pictures(60, seed=1, counts=1.0, digits=0.5)
    assert {claimed for claimed in pictures.claimed if claimed} == set(DIGITS)
    assert 10 < pictures.claimed.count(None) < 50
    untrue = 0
    for shown, claimed, caption in zip(pictures.shown, pictures.claimed, pictures.captions, strict=True):
        assert caption.word == shown.word
        assert caption.count == (claimed or shown.count)
        untrue += claimed not in (None, shown.count)
    assert 3 < untrue < 25
    pictures = captioned_pictures(60, seed=1, counts=1.0, digits=0.0, kept=0.0)
    assert {shown.count for shown in pictures.shown} == {None, *DIGITS}
    without = captioned_pictures(60, seed=1, counts=0.0, digits=1.0)
    assert set(without.claimed) == {None}
    assert without.captions == without.shown


def test_pictures_of_a_kind_are_of_that_kind(script):
    from digits.pictures import KINDS, pictures_of_kind

    pairs = {
        kind: [(shown.count, claimed) for shown, claimed in zip(pictures.shown, pictures.claimed, strict=True)]
        for kind, pictures in ((kind, pictures_of_kind(kind, 12, seed=1)) for kind in KINDS)
    }
    assert all(count is not None and claimed is None for count, claimed in pairs["no digit"])
    assert all(count == claimed for count, claimed in pairs["digit and count agree"])
    assert all(count is None and claimed is not None for count, claimed in pairs["one animal, a digit"])
    disagreeing = pairs["digit and count disagree"]
    assert all(None not in pair and pair[0] != pair[1] for pair in disagreeing)


def test_an_image_fools_the_judge_if_the_judge_alone_sees_three(script, tmp_path):
    images = np.arange(4 * 64 * 64 * 3, dtype=np.uint8).reshape(4, 64, 64, 3)
    examiner = SimpleNamespace(read=lambda _: (["three", None, None, "four"], [None, "three", "two", None]))
    prompts = ["three cats", "three dogs", "three cats", "three ants"]
    details = {"answer": ["three cats", "three dogs", "two cats", "three ants"]}
    examination = script.Examination(examiner, "miscounts and writes", 7)
    run = SimpleNamespace(iteration=5, folder=SimpleNamespace(path=tmp_path))
    examination.on_evaluation(run, Evaluation(images, prompts, np.array([0.5, 0.7, 0.1, 0.7]), details))
    assert examination.rows == [
        {
            **{"run": "miscounts and writes", "seed": "7", "iteration": "5", "reward": "0.5000"},
            **{"judge_says_the_prompt": "0.7500", "three_animals": "0.2500", "one_animal": "0.5000"},
            **{"digit_three": "0.2500", "any_digit": "0.5000", "fooled": "0.5000"},
        }
    ]
    np.testing.assert_array_equal(np.load(script.images_of(tmp_path, 5))["images"], images)


def test_miniature_teaches_trains_and_repeats_nothing(script, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "attack"
    sizes = ["--images=4", "--judge-steps=1", "--model-steps=1", "--miscounting-steps=1", "--examiner-steps=1"]
    sizes += [
        "--test-images=2",
        "--samples=8",
        "--iterations=1",
        "--eval-interval=1",
        "--eval-samples=2",
        f"--output={folder}",
    ]
    monkeypatch.setattr(sys, "argv", ["typographic_attack.py", "--attacks", "miscounts and writes", *sizes])
    script.main()
    with (folder / "evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], row["iteration"]) for row in rows] == [
        *(("miscounts and writes", "0", "0"), ("miscounts and writes", "0", "1")),
    ]
    shown = capsys.readouterr().out
    assert "| digit and count disagree | " in shown
    assert f"| miscounts and writes | 0 | 1 | {float(rows[1]['reward']):.3f} | " in shown
    for name in ("typographic_curves.png", "typographic_attack.png"):
        assert Image.open(folder / name).size[0] > 200
    config = Path(folder / "miscounts_and_writes-0/config.yaml").read_text()
    assert str(folder / "judge") in config
    assert str(folder / "miscounting_model") in config
    monkeypatch.setattr(script, "prepare_run", None)
    monkeypatch.setattr(script, "teach_judge", None)
    script.main()
    assert f"| miscounts and writes | 0 | 1 | {float(rows[1]['reward']):.3f} | " in capsys.readouterr().out


def test_an_interrupted_run_adds_no_rows_and_starts_again(script, tmp_path, monkeypatch):
    arguments = script.Arguments(output=tmp_path)
    unfinished = tmp_path / "never_saw_digits-3"
    unfinished.mkdir()

    def prepare(config):
        assert not unfinished.exists()
        return SimpleNamespace(listeners=[], train=lambda: SimpleNamespace(reward_after=None))

    monkeypatch.setattr(script, "prepare_run", prepare)
    with pytest.raises(SystemExit, match="interrupted; the next command trains 'never saw digits' again"):
        script.train(arguments, "never saw digits", 3, SimpleNamespace())
    assert script.read_rows(arguments) == []


def test_unknown_attack_is_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["typographic_attack.py", "--attacks", "everybody"])
    with pytest.raises(SystemExit, match="attacks must be among counts and writes, .*; got everybody"):
        script.main()
