"""The pages that people read, and what stands in their fences, inline code and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GENERATED = ("options.md",)  # checked where it is generated
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Snippet(NamedTuple):
    """A command or a piece of Python, and where it stands."""

    page: Path
    line: int
    text: str

    @property
    def place(self) -> str:
        """``README.md:17``, as test ids and messages have it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """README, CONTRIBUTING, SECURITY and every page of docs/ that is written by hand."""
    docs = sorted((ROOT / "docs").rglob("*.md"))
    written = [page for page in docs if page.name not in GENERATED]
    return [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *written]


def fences(language: str) -> list[Snippet]:
    """The fences of a language on all pages."""
    every = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 2
                every.append(Snippet(page, line, match[2]))
    return every


def commands() -> list[Snippet]:
    """Every command of every ``sh`` fence; a line that ends in a backslash goes on."""
    every = []
    for fence in fences("sh"):
        joined = re.sub(r"\\\n\s*", lambda match: f"{' ' * 8}\0", fence.text)
        line = fence.line
        for command in joined.splitlines():
            continued = command.count("\0")
            command = re.sub(r"\s*\0", " ", command)
            if shlex.split(command, comments=True):
                every.append(Snippet(fence.page, line, command))
            line += 1 + continued
    return every


def inline(page: Path) -> Iterator[str]:
    """What stands in backticks on a page, outside of fences."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        yield " ".join(match[1].split())


def links(page: Path) -> Iterator[str]:
    """Targets of links and images on a page, without those of other hosts."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in re.finditer(r"\]\(([^)\s]+)\)", text):
        if "://" not in match[1]:
            yield match[1]
