"""Which versions work: the tests in new environments, with the lowest, the pinned and the newest versions.

    python scripts/benchmarks/version_matrix.py --pythons python3.11 python3.12 --versions lowest newest

Each environment is made in a temporary folder and deleted afterwards. `lowest` takes the lower bounds of
`pyproject.toml`, `pinned` takes `constraints.txt`, and `newest` takes what pip chooses. pip's own settings apply, so an
index with CPU builds of torch can be given in PIP_EXTRA_INDEX_URL.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
Versions = Literal["lowest", "pinned", "newest"]
_SHOWN = ("torch", "diffusers", "transformers", "gymnasium", "stable-baselines3", "peft", "numpy")
_TESTS = (
    "tests/ddpo_env/test_env.py",
    "tests/ddpo_env/models/test_families.py",
    "tests/agents/algorithms/test_ppo.py",
    "tests/agents/policy/test_lora.py",
    "tests/agents/training/test_training.py",
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is tested with what."""

    pythons: tuple[str, ...] = (sys.executable,)
    """Interpreters."""
    versions: tuple[Versions, ...] = ("lowest", "newest")
    """Which versions of the dependencies."""
    torch: str | None = None
    """A version of torch that replaces the lowest and the newest one, for a machine that holds only one build."""
    tests: tuple[str, ...] = _TESTS
    """Test files."""


def lowest_versions(extras: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the lower bound of every dependency in `pyproject.toml`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(one for name in extras for one in project["optional-dependencies"][name])]
    bounds: dict[str, str] = {}
    for requirement in map(Requirement, listed):
        for specifier in requirement.specifier:
            if specifier.operator in (">=", "=="):
                bounds[requirement.name] = specifier.version
    return bounds


def constraints_for(versions: Versions, torch: str | None) -> list[str]:
    """Return the lines of a constraints file."""
    if versions == "pinned":
        return (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    bounds = lowest_versions() if versions == "lowest" else {}
    if torch is not None:
        bounds["torch"] = torch
    # A lower bound without a patch number means its newest patch release.
    return [f"{name}~={version}.0" if version.count(".") == 1 and name != "numpy" else f"{name}=={version}"
            for name, version in bounds.items()]  # fmt: skip


def run_row(python: str, versions: Versions, arguments: Arguments) -> tuple[str, dict[str, str], str]:
    """Make an environment and run the tests in it.

    Returns:
        Python's version, the installed versions, and the last line of pytest or the error of pip.
    """
    folder = Path(tempfile.mkdtemp(prefix="matrix-"))
    try:
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        interpreter = str(folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python")
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(constraints_for(versions, arguments.torch)), encoding="utf-8")
        packages = ["-e", f"{ROOT}[rewards]", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "moviepy"]
        install = [interpreter, "-m", "pip", "install", "-q", "-c", str(constraints), *packages]
        installed = subprocess.run(install, capture_output=True, text=True)
        number = _output([interpreter, "-c", "import platform; print(platform.python_version())"])
        if installed.returncode:
            return number, {}, f"not installed: {installed.stderr.strip().splitlines()[-1]}"
        found = dict(re.findall(r"^([\w.-]+)==(\S+)$", _output([interpreter, "-m", "pip", "freeze"]), re.MULTILINE))
        known = {name.lower().replace("_", "-"): version for name, version in found.items()}
        test = [interpreter, "-m", "pytest", "-q", "-n", "1", *arguments.tests]
        tested = subprocess.run(test, capture_output=True, text=True, cwd=ROOT)
        lines = (tested.stdout.strip() or tested.stderr.strip()).splitlines()
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return number, known, "; ".join([lines[-1], *failures])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Print the table, one row per environment."""
    arguments = tyro.cli(Arguments, description=__doc__)
    print(f"| Python | versions | {' | '.join(_SHOWN)} | tests |", flush=True)
    print("| --- " * (len(_SHOWN) + 3) + "|", flush=True)
    for python in arguments.pythons:
        for versions in arguments.versions:
            number, known, outcome = run_row(python, versions, arguments)
            shown = " | ".join(known.get(name, "") for name in _SHOWN)
            print(f"| {number} | {versions} | {shown} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
