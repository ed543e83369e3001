"""The fabrics that one suite is run over, each with a pair of engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.fabrics import CASES, Case, Link, no_leaks


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """A fabric; files that are for some of them have a fixture of this name."""
    found: Case = request.param
    return found


@pytest.fixture
def link(case: Case) -> Iterator[Link]:
    """Two engines of it that leave nothing behind."""
    with no_leaks():
        made = case.open()
        yield made
        made.close()
