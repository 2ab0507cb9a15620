"""How tests run a script of the project in this process."""

import importlib.util
import sys

from helpers.paths import SCRIPTS

MINIATURE = [
    "--samples-per-iteration=4",
    "--sample-batch-size=4",
    "--samples-per-prompt=2",
    "--stat-min-count=2",
    "--train-batch-size=4",
    "--num-inference-steps=2",
    "--eval-samples=3",
    "--lora-rank=1",
    "--device=cpu",
]


def run_script(name, arguments, monkeypatch):
    """Run a script's main() in this process, as its own command line would."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    spec.loader.exec_module(module)
    return module.main()
