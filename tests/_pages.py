"""The README and the guide, as their readers have them: fenced blocks and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, and the line of its page that its first line is."""

    page: Path
    language: str
    line: int
    text: str


def lines_of(page: Path = README) -> list[str]:
    return page.read_text(encoding="utf-8").splitlines()


def blocks_of(language: str | None = None, page: Path = README) -> list[Block]:
    """The blocks of a page, in its order."""
    found: list[Block] = []
    opened: tuple[str, int] | None = None
    for number, line in enumerate(lines_of(page), 1):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = line[3:], number + 1
        else:
            assert line == "```", f"{page.name}:{number}: a fence inside a fence"
            text = "\n".join(lines_of(page)[opened[1] - 1 : number - 1]) + "\n"
            found.append(Block(page, *opened, text))
            opened = None
    assert opened is None, f"{page.name}: a fence that does not end"
    return [block for block in found if language in (None, block.language)]


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(language, page)]


def section_blocks(heading: str, page: Path = README) -> list[Block]:
    """The blocks below a heading, up to the next one."""
    lines = lines_of(page)
    first = lines.index(heading) + 1
    last = next(
        (n for n, line in enumerate(lines[first:], first + 1) if re.match("#+ ", line)),
        len(lines) + 1,
    )
    return [block for block in blocks_of(page=page) if first < block.line < last]


def rows_of(first_cell: str) -> Iterator[list[str]]:
    """The cells of the rows of the table with this heading."""
    lines = iter([line for page in PAGES for line in [*lines_of(page), ""]])
    for line in lines:
        if line.startswith(f"| {first_cell} |"):
            break
    else:
        pytest.fail(f"no page has a table that starts with {first_cell!r}")
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split(" | ")]
