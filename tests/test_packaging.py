"""The wheel: what it contains, and that its commands train and sample outside of the checkout; the source archive."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.scripts import MINIATURE
from PIL import Image

PACKAGES = ("agents", "ddpo_env", "rewards")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def pip(*arguments: str | Path) -> None:
    """Run pip; show its output if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(source: Path, output: Path) -> Path:
    """Build the wheel of a source folder or archive, without a download where setuptools is installed."""
    offline = ["--no-build-isolation"] if find_spec("setuptools") else []
    pip("wheel", "--no-deps", *offline, "--wheel-dir", output, source)
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> set[str]:
    """Files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel alone; its dependencies are those of this interpreter."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def run(installed: Path, command: list[str], folder: Path) -> str:
    """Run a command in a folder, with the installed packages before an editable install; return its output."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_contains_every_module_type_marker_and_data_file(wheel):
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    expected = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert any(name.startswith("ddpo_env/data/tiny/") for name in expected)
    assert any(name.startswith("rewards/data/tiny_clip/") for name in expected)
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == expected


@pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools, which builds the archive, is not installed")
def test_source_archive_gives_the_same_wheel(source, wheel, tmp_path):
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert contents(build_wheel(archive, tmp_path / "wheel")) == contents(wheel)


def test_installed_packages_are_the_ones_that_are_imported(installed, tmp_path):
    code = f"import {', '.join(PACKAGES)}; print(*[package.__file__ for package in ({', '.join(PACKAGES)})], sep='\\n')"
    found = run(installed, [sys.executable, "-c", code], tmp_path).split()
    assert found == [str(installed / package / "__init__.py") for package in PACKAGES]


def test_commands_train_and_sample_in_another_folder(installed, tmp_path):
    train = [str(installed / "bin" / "ddpo-train"), *MINIATURE, "--iterations=1", "--run-dir=run"]
    assert "ddpo-sample --lora run/lora" in run(installed, train, tmp_path)
    options = ["--lora=run/lora", "--compare", "--seeds=0", "--num-inference-steps=2", "--device=cpu"]
    run(installed, [str(installed / "bin" / "ddpo-sample"), *options, "--prompts", "a cat", "a fox"], tmp_path)
    assert Image.open(tmp_path / "samples.png").size[0] > 200
