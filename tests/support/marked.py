"""Finds the processes of a run by a mark in their environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

__all__ = ["MARK", "marked", "marked_run"]

MARK: Final = "WEIGHTSYNC_TEST_MARK"


def marked(value: str) -> list[psutil.Process]:
    """Processes, zombies too, whose environment holds the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == value:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@contextmanager
def marked_run(folder: Path) -> Iterator[dict[str, str]]:
    """An environment for commands; in the end none of their processes and files may be left."""
    temporary = folder / "tmp"
    temporary.mkdir()
    yield {**os.environ, MARK: str(folder), "TMPDIR": str(temporary)}
    left = marked(str(folder))
    for process in left:
        process.kill()
    assert left == []
    assert list(temporary.iterdir()) == []
