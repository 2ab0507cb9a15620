"""Several runs at the same time, one process each: a failed run ends them, and is not found out at the end only."""

from functools import partial
from typing import NamedTuple

import pytest


class Run(NamedTuple):
    """A run that fails if its number is odd."""

    number: int


def train(folder, run):
    """Note that the run began; this is called in another process."""
    (folder / str(run.number)).touch()
    if run.number % 2:
        raise FloatingPointError(f"run {run.number} diverged")
    return [{"number": str(run.number)}]


def test_the_first_error_ends_the_runs(scripts_on_path, tmp_path):
    from comparisons.many_runs import perform, read_rows

    file, begun = tmp_path / "results" / "rows.csv", tmp_path / "begun"
    begun.mkdir()
    with pytest.raises(FloatingPointError, match="run 1 diverged"):
        perform([Run(number) for number in range(8)], partial(train, begun), file, ["number"], 1, jobs=1)
    assert read_rows(file) == [{"number": "0"}]
    assert len(list(begun.iterdir())) < 8
