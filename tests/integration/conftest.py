from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.marked import marked_run


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a command that leaves no process and no file behind."""
    with marked_run(tmp_path) as environ:
        yield environ
