"""When two runs are the same: bit for bit, save for what a clock told."""

import csv
import json
from pathlib import Path
from typing import Any

from agents.training.checkpoint import latest_checkpoint
from helpers.micro_agents import files_below


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of `progress.csv`."""
    with (folder / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(folder: Path, expected: Path) -> None:
    """Weights, adapters, metrics, statistics, random states and images are the same bits.

    Of the checkpoints only the newest ones are compared.
    """
    assert _files(folder) == _files(expected)
    for name in _files(folder):
        if name.endswith((".safetensors", ".png")) or name.startswith("samples/"):
            assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    mine, theirs = (
        [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows(run)]
        for run in (folder, expected)
    )
    assert mine == theirs
    assert _state(folder) == _state(expected)


def _files(folder: Path) -> set[str]:
    newest = f"checkpoints/{latest_checkpoint(folder / 'checkpoints').name}/"
    return {
        name
        for name in files_below(folder)
        if "tfevents" not in name and (not name.startswith("checkpoints/") or name.startswith(newest))
    }


def _state(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's state without times."""
    state: dict[str, Any] = json.loads((latest_checkpoint(folder / "checkpoints") / "state.json").read_text())
    for episode in state["episodes"]:
        del episode["t"]
    return state
