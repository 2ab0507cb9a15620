"""What docs/report.md promises: the limits of its verdicts are those of the code, and its commands are valid."""

import re
import shlex

import tyro
from helpers.paths import ROOT

from agents.report.command import ReportArguments
from agents.report.page import MOST_RUNS
from agents.report.verdicts import DIVERSITY_LOSS, GRID_GROWTH, NORM_RATIO

TEXT = (ROOT / "docs" / "report.md").read_text("utf-8")


def limits(monitor):
    """The numbers in the row of a monitor."""
    (row,) = re.findall(rf"^\| {monitor} \|(.*)$", TEXT, re.MULTILINE)
    return [float(number) for number in re.findall(r"[0-9]+", row)]


def test_limits_are_those_of_the_code():
    assert limits("output norm") == [100 * limit for limit in NORM_RATIO]
    assert limits("diversity") == [100 * limit for limit in DIVERSITY_LOSS]
    assert limits("grid pattern") == list(GRID_GROWTH)
    assert f"at most {MOST_RUNS})" in TEXT


def test_commands_are_valid():
    lines = [line for line in TEXT.splitlines() if line.startswith("ddpo-report")]
    assert len(lines) == 4
    for line in lines:
        tyro.cli(ReportArguments, args=shlex.split(line, comments=True)[1:]).check()
