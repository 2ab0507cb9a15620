"""What the site adds to docs/: README.md as its first page, and the files of the repository that pages link to."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#]+)")
INDEX = "index.md"
SOURCES = "repository"
"""Folder of the site with files that are outside of docs/."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, and every file outside of docs/ that a page links to, as a static file."""
    files.append(File.generated(config, INDEX, content=(ROOT / "README.md").read_text("utf-8")))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    linked = {_target(page, link) for page in pages for link in _LINK.findall(page.read_text("utf-8"))}
    for file in sorted(file for file in linked if file and file.parts[0] != "docs" and file.name != "README.md"):
        files.append(File.generated(config, _static(file), content=(ROOT / file).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where the site has their files."""
    source = ROOT / "README.md" if page.file.src_uri == INDEX else ROOT / "docs" / page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        file = _target(source, link[1])
        if file is None:  # --strict tells it
            return link[0]
        if file == Path("README.md"):
            return INDEX
        return file.relative_to("docs").as_posix() if file.parts[0] == "docs" else _static(file)

    return _LINK.sub(moved, markdown)


def _target(page: Path, link: str) -> Path | None:
    """Return the file that a link of a page leads to, relative to the root of the repository."""
    file = (page.parent / link).resolve()
    return file.relative_to(ROOT) if file.is_file() and file.is_relative_to(ROOT) else None


def _static(file: Path) -> str:
    """Return where the site has a file that is outside of docs/: under a name that browsers show as it is."""
    return f"{SOURCES}/{file.as_posix()}.txt"
