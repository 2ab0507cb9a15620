"""The example sessions in the environments' docstrings, which are their documentation pages, run as they stand."""

import doctest

import pytest

from ddpo_env import env, vector_env


@pytest.mark.parametrize("module", [env, vector_env])
def test_example_session_runs(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted >= 5
    assert result.failed == 0


@pytest.mark.parametrize(
    "section",
    ["Description", "Action Space", "Observation Space", "Rewards", "Starting State", "Episode End", "Arguments"],
)
def test_page_has_gymnasiums_sections(section: str) -> None:
    page = vector_env.DenoisingVectorEnv.__doc__ or ""
    assert f"## {section}\n" in page
    assert "## Version History\n\n    * v0:" in page
