"""What README.md promises: its Python blocks run as they stand, only smaller, and its links lead somewhere."""

import re

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from helpers.paths import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SMALLER = {
    "iterations=20": "iterations=1, samples_per_iteration=4, eval_samples=2",
    ".learn(1600)": ".learn(160)",
    "num_envs=64": "num_envs=2",
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"\w+", block)[-1])
def test_block_runs(block, tmp_path, monkeypatch):
    (tmp_path / "ddpo_env").symlink_to(ROOT / "ddpo_env")  # a path in the block is relative to the clone
    monkeypatch.chdir(tmp_path)
    for large, small in SMALLER.items():
        block = block.replace(large, small)
    names = {"__name__": "__main__"}
    exec(compile(block, "README.md", "exec"), names)
    if "run_training" in block:
        trained = np.asarray(Image.open("fox.png"))
        assert trained.shape == (64, 64, 3)
        loaded = [name for name in names["pipe"].unet.state_dict() if "lora" in name]
        assert loaded
    if "image" in names:
        assert names["image"].shape == (64, 64, 3)
        assert names["reward"] < 0


def test_every_replacement_makes_something_smaller():
    code = "".join(BLOCKS)
    assert all(large in code for large in SMALLER)


def test_bundled_model_loads_with_stock_diffusers_from_the_named_folder():
    assert 'model = "ddpo_env/data/tiny"' in README
    assert isinstance(StableDiffusionPipeline.from_pretrained(ROOT / "ddpo_env/data/tiny"), StableDiffusionPipeline)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_lead_somewhere(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    named = set(
        re.findall(r"(?<![\w/])(?:scripts|tests|agents|ddpo_env|rewards)/[\w/]+\.py\b", page.read_text("utf-8"))
    )
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_readme_is_short():
    assert len(README.splitlines()) <= 200
