"""What docs/rewards.md promises: every built-in reward has its line."""

from helpers.paths import ROOT

from rewards import BUILTIN_REWARDS

PAGE = (ROOT / "docs" / "rewards.md").read_text("utf-8")


def test_every_built_in_reward_is_documented_and_measured_or_said_not_to_be():
    for name in BUILTIN_REWARDS:
        assert f"| `{name}` |" in PAGE
    measured = PAGE.partition("## Throughput")[2]
    for name in BUILTIN_REWARDS.keys() - {"jpeg_incompressibility"}:
        assert f"`{name}`" in measured
