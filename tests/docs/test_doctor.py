"""What docs/doctor.md promises: every check is described, and the example shows it."""

import re

from helpers.paths import ROOT

from agents.commands.doctor.checks import CHECKS

PAGE = (ROOT / "docs" / "doctor.md").read_text("utf-8")


def test_every_check_is_described_in_its_order():
    table = PAGE.partition("## Checks")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert rows[2:] == list(CHECKS)


def test_example_shows_every_check():
    shown = re.findall(r"^(?:green|amber|red  ) ([\w ]{20})", PAGE, re.MULTILINE)
    assert [name.strip() for name in shown] == list(CHECKS)
