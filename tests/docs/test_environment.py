"""What docs/environment.md promises: the script that makes its table works in miniature."""

import importlib.util
import json
import re
import sys

import pytest
from helpers.paths import SCRIPTS

MINIATURE = [
    *("--rewards=jpeg_compressibility", "--num-inference-steps=2", "--episodes=4", "--num-envs=2", "--device=cpu"),
    *("--threads=1", "--iterations=1", "--samples-per-iteration=4", "--seeds", "0"),
]


@pytest.fixture
def script(monkeypatch):
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("environment", SCRIPTS / "benchmarks" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "environment", module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_table_has_every_policy(script, micro_pipeline_folder, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    arguments = [*MINIATURE, f"--model={micro_pipeline_folder}", f"--json={figures}"]
    monkeypatch.setattr(sys, "argv", ["environment.py", *arguments])
    assert script.main() == 0, capsys.readouterr().err
    rows = json.loads(figures.read_text())
    assert [row["policy"].partition(",")[0] for row in rows] == ["random", "random", "pretrained", "trained"]
    assert all(len(row["scores"]) == 1 and row["steps_per_second"] > 0 for row in rows)
    scores = {row["policy"]: row["scores"][0] for row in rows}
    assert len(set(scores.values())) == 4
    assert scores["pretrained"] < 0
    shown = capsys.readouterr().out
    assert all(f"| `jpeg_compressibility` | {name} | {score:.3f} |" in shown for name, score in scores.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes=3", "--num-envs=2"], "episodes must be a multiple of num_envs=2; got 3"),
        (["--trained", "runs/a"], r"trained must name one run per seed \(3\) of a single reward"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(script, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["environment.py", *arguments])
    assert script.main() == 2
    assert re.search(message, capsys.readouterr().err)
