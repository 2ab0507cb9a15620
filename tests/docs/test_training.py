"""What docs/training.md promises: its Python example runs."""

import re

from helpers.paths import ROOT

PAGE = (ROOT / "docs" / "training.md").read_text("utf-8")


def test_example_trains(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    smaller = code.replace("iterations=20", "iterations=1, samples_per_iteration=4, eval_samples=2")
    assert smaller != code
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(smaller, "training.md", "exec"), names)
    assert names["longer"].iterations == 40
    assert (tmp_path / "runs" / "first" / "lora").is_dir()
    assert not (tmp_path / "runs" / "longer").exists()
