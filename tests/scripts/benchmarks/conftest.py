"""What the tests of the benchmarks share."""

import json
import sys

import pytest
import torch
from helpers.paths import SCRIPTS


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    """Look imports up in the benchmarks' folder, as for a script that is run; keep the number of threads."""
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.fixture
def figures_of(monkeypatch, capsys):
    """Run a benchmark's `main` with a command line, and return the figures that it prints."""

    def run(script, arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        code = script.main()
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return json.loads(shown.out[shown.out.index("{\n") :])

    return run


@pytest.fixture
def small_architecture(monkeypatch):
    """Make the random model `sd14` as small as `small`."""
    import random_stable_diffusion

    architectures = random_stable_diffusion.pipelines.ARCHITECTURES
    monkeypatch.setitem(architectures, "sd14", architectures["small"])
