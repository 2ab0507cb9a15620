"""Other projects have an `agents` or a `rewards` too: `import ddpo_env` says which file Python finds in our place."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ddpo_env

OURS = Path(ddpo_env.__file__).parents[1]


def run_python(code: str, folder: Path, *path: Path) -> "subprocess.CompletedProcess[str]":
    """Run code in a folder; `path` comes before everything else that is installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, OURS]))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Our three packages in a folder of their own, as in site-packages: their `__init__` files are enough."""
    folder = tmp_path / "site-packages"
    for name in ("ddpo_env", "rewards", "agents"):
        (folder / name).mkdir(parents=True)
        shutil.copy(OURS / name / "__init__.py", folder / name)
    return folder


def test_own_packages_say_nothing(tmp_path: Path) -> None:
    done = run_python("import ddpo_env", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("file", ["rewards.py", "rewards/__init__.py"])
def test_foreign_rewards_are_an_error_that_names_the_file(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("raise SystemExit('it was imported')")
    for code in ("import ddpo_env", "import gymnasium; gymnasium.make('ddpo_env:DDPO-SD-v0')"):
        done = run_python(code, tmp_path)
        last = done.stderr.splitlines()[-1]
        assert last.startswith("ImportError: ddpo-env needs its package rewards")
        assert str(tmp_path / file) in last
        assert "Rename or move what Python finds" in last
        assert f'or put our folder in front: PYTHONSAFEPATH=1 PYTHONPATH="{OURS}"' in last


def test_the_line_that_the_error_gives_helps(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("raise SystemExit('it was imported')")
    script = tmp_path / "script.py"
    script.write_text("import ddpo_env, rewards; print(rewards.__file__)")
    line = f'PYTHONSAFEPATH=1 PYTHONPATH="{OURS}" {sys.executable} script.py'
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(OURS / "rewards" / "__init__.py")


@pytest.mark.parametrize("file", ["agents.py", "agents/__init__.py"])
def test_foreign_agents_are_a_warning(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("class Agent: ...")
    code = "import ddpo_env, gymnasium; print(gymnasium.make('DDPO-Points-v0').reset(seed=0)[1])"
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "{'prompt': 'a point'}"
    assert "RuntimeWarning: The environments work, but `import agents` does not: ddpo-env needs its" in done.stderr
    assert str(tmp_path / file) in done.stderr


def test_folder_that_is_no_package_is_no_rival(tmp_path: Path) -> None:
    for name in ("rewards", "agents"):
        (tmp_path / name).mkdir()
    assert run_python("import ddpo_env", tmp_path).stderr == ""


@pytest.mark.parametrize(("name", "kind"), [("agents", "RuntimeWarning"), ("rewards", "ImportError")])
def test_another_distribution_in_the_same_folder(copied: Path, tmp_path: Path, name: str, kind: str) -> None:
    assert run_python("import ddpo_env", tmp_path, copied).stderr == ""
    (copied / name / "__init__.py").write_text("class Agent: ...")
    done = run_python("import ddpo_env", tmp_path, copied)
    assert f"{kind}: " in done.stderr
    assert f"{copied / name / '__init__.py'} is not the package {name} of ddpo-env" in done.stderr


def test_missing_packages(copied: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(copied)}
    arguments = [sys.executable, "-S", "-c", "import sys; sys.path.append(sys.argv[1]); import ddpo_env"]
    site_packages = str(Path(pytest.__file__).parents[1])
    shutil.rmtree(copied / "agents")
    done = subprocess.run([*arguments, site_packages], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stderr == ""
    shutil.rmtree(copied / "rewards")
    done = subprocess.run([*arguments, site_packages], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "ddpo-env needs its package rewards" in done.stderr
    assert "Python finds nothing under that name" in done.stderr
