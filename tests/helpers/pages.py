"""What README.md and the pages of docs/ show a reader: blocks of code and commands, and why some are not run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INLINE = "inline"
"""Language of a command in a sentence or a table."""
_MARK = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)
_COMMAND = re.compile(r"(\w+=\S+ )*(\.venv/bin/)?(python3? )?(ddpo-\w+|pip|pytest|torchrun|scripts/\S+\.py) \S")
"""A program with arguments; without any, a sentence names the program."""


@dataclass(frozen=True)
class Block:
    """A fenced block, or a command in a sentence.

    Attributes:
        page: name of the file.
        line: of the page, counted from 1; the code begins on the next one.
        language: of the fence; `INLINE` in a sentence.
        code: what it holds.
        reason: the text of the comment `<!-- not run: reason -->` before the block, table or paragraph.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        """Name the block in the output of a test."""
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return every block and command of a page, in order."""
    return list(blocks_of(page.name, page.read_text("utf-8")))


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """Yield every block and command of a page's text, in order."""
    reason = None
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block" and (mark := _MARK.search(token.content)):
            reason = mark[1]
            continue
        if token.type in ("fence", "code_block"):
            yield Block(page, line, token.info.strip(), token.content, reason)
        for part in token.children or ():
            if part.type == "code_inline" and _COMMAND.match(part.content):
                yield Block(page, line, INLINE, part.content, reason)
        if token.level == 0 and token.nesting <= 0:  # the mark is for one block, paragraph, list or table
            reason = None


def commands(block: Block) -> list[list[str]]:
    """Return the words of each command of a block; in a shown session, of the lines that begin with `$`."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language not in ("bash", INLINE):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found: list[list[str]] = []
    for line in lines:
        found.append([])
        for word in shlex.split(line, comments=True):
            if word == "&&":
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]
