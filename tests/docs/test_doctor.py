"""What docs/doctor.md promises: every check is described, and the example's output has its form."""

import re

from helpers.paths import ROOT

from agents.commands.doctor.checks import CHECKS

PAGE = (ROOT / "docs" / "doctor.md").read_text("utf-8")


def test_every_check_is_described_in_its_order():
    table = PAGE.partition("## Checks")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert rows[2:] == list(CHECKS)


def test_python_example_examines_a_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "doctor.md", "exec"), names)
    assert [finding.name for finding in names["findings"]] == list(CHECKS)
    assert "red" not in {finding.level for finding in names["findings"]}
    assert {path.name for path in tmp_path.iterdir()} == {"doctor"}


def test_example_shows_every_check():
    shown = re.findall(r"^(?:green|amber|red  ) ([\w ]{20})", PAGE, re.MULTILINE)
    assert [name.strip() for name in shown] == list(CHECKS)
