"""What README.md promises: it is short, and its links and those of docs/ lead somewhere."""

import re

import pytest
from diffusers import StableDiffusionPipeline
from helpers.pages import PAGES
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text("utf-8")


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
