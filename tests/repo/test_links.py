"""Links in the documentation lead somewhere: files that exist, headings that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from support.tree import ROOT

LINK: Final = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
CODE: Final = re.compile(r"^(```|~~~).*?^\1[^\n]*$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
FENCE: Final = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
HEADING: Final = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
ELSEWHERE: Final = ("http://", "https://", "mailto:")


def anchors(text: str) -> set[str]:
    """Anchors of the headings, made as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"[^\w\- ]", "", LINK.sub(lambda m: m[0][1 : m[0].index("]")], heading))
        anchor = plain.strip().lower().replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(name)
    return found


def broken(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(ELSEWHERE):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists():
            found.append(f"{target}: no such file")
        elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text("utf-8")):
            found.append(f"{target}: no such heading")
    return found


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_there_are_pages() -> None:
    assert {path.name for path in pages()} >= {"CONTRIBUTING.md", "interfaces.md", "concepts.md"}


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


@pytest.mark.parametrize(
    ("text", "num_broken"),
    [
        ("[a](gone.md)", 1),
        ("![picture](gone.png)", 1),
        ("[a](other.md#missing)", 1),
        ("[a](#nowhere)", 1),
        ("[a](other.md#the-heading-here)", 0),
        ("# Here, too\n[a](#here-too)", 0),
        ("[a](https://example.org/gone)", 0),
        ("`[a](gone.md)`\n```\n[a](gone.md)\n```\n", 0),
    ],
)
def test_checker(tmp_path: Path, text: str, num_broken: int) -> None:
    (tmp_path / "other.md").write_text("# Title\n\n## The *heading* `here`\n")
    (tmp_path / "page.md").write_text(text)
    assert len(broken(tmp_path / "page.md")) == num_broken
