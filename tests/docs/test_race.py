"""What docs/race.md promises: its example of a file is one, and its numbers are those of a plan."""

import re
import shlex

from helpers.paths import ROOT

from agents.commands.race.command import RaceLine, prepare_race
from agents.commands.race.contenders import read_contenders
from agents.config.command_line import parse_command_line, parse_settings_line
from agents.distributed import Processes

PAGE = (ROOT / "docs" / "race.md").read_text("utf-8")


def test_example_of_a_file_has_the_contenders_that_it_says(tmp_path):
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "contenders.yaml").write_text(example)
    found = read_contenders(tmp_path / "contenders.yaml", parse_command_line([]).config, tmp_path)
    assert [one.name for one in found] == ["ppo-0.002", "ppo-0.005", "ppo-0.01", "sparse", "defaults"]


def test_command_of_the_long_race_starts_with_the_plan_that_the_page_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (command,) = [block for block in blocks if "--final-seeds" in block]
    race = prepare_race(parse_settings_line(RaceLine, shlex.split(command.replace("\\\n", " "))[1:]), Processes())
    assert [(rung.contenders, rung.budget) for rung in race.rungs] == [(27, 144), (9, 432), (3, 1296)]
    assert race.rungs[-1].seeds == (0, 1, 2)
    assert (race.iterations("rwr-0.001")[0], race.iterations("ppo-0.005")[0]) == (1, 2)


def test_example_of_a_budget_has_the_iterations_that_the_page_says(monkeypatch):
    """384 queries in the first rung: 5 iterations of 72 samples, 2 of 144."""
    monkeypatch.chdir(ROOT)
    words = "--contenders scripts/experiments/race/contenders.yaml --preset tiny-compressibility --budget 3456"
    race = prepare_race(parse_settings_line(RaceLine, words.split()), Processes())
    assert (race.iterations("ppo-0.005")[0], race.iterations("rwr-0.001")[0]) == (5, 2)
