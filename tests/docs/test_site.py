"""The site of docs/: it builds with every link right, shows every page and public name, and its notebook runs."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import PAGES
from helpers.paths import ROOT
from PIL import Image

import agents
import ddpo_env
import rewards

IS_BUILT = all(find_spec(name) for name in ("mkdocs", "material", "mkdocstrings"))


@pytest.mark.skipif(not IS_BUILT, reason='the extra "docs" is not installed')
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PPO with interchangeable advantages" in (tmp_path / "reference" / "index.html").read_text("utf-8")
    assert (tmp_path / "repository" / "CHANGELOG.md.txt").read_bytes() == (ROOT / "CHANGELOG.md").read_bytes()


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted({page.name for page in PAGES} - {"README.md"} | {"index.md"})


@pytest.mark.parametrize("package", [agents, ddpo_env, rewards])
def test_reference_has_every_public_name(package: Any) -> None:
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    shown = re.findall(rf"^::: {package.__name__}\.(\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(set(package.__all__) - {"__version__"})


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ddpo_env").symlink_to(ROOT / "ddpo_env")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads((ROOT / "docs" / "first-run.ipynb").read_text("utf-8"))["cells"]:
        assert not cell.get("outputs"), "outputs make the file large and its history unreadable"
        if cell["cell_type"] == "code":
            code = re.sub("^%pip .*$", "", "".join(cell["source"]), flags=re.MULTILINE)
            exec(code.replace("iterations=10", "iterations=1, samples_per_iteration=4, eval_samples=2"), names)
    before, after = names["before"], names["after"]
    assert isinstance(after, Image.Image)
    assert before.tobytes() != after.tobytes()
