"""A program for the guest: runs pytest and says which tests passed, failed and were skipped.

    python -P guest_suite.py REPORT PYTEST_ARGUMENT...

Writes a JSON object into REPORT: `outcomes` of the tests by their ids, `reasons` of those that were
skipped, `durations` in seconds, and `imported`: packages that are too slow to be loaded in a guest,
and were.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import pytest

SLOW_PACKAGES: Final = ("torch",)


class Outcomes:
    """The worst outcome of each test's setup, call and teardown."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.durations: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self.durations[name] = self.durations.get(name, 0.0) + report.duration
        if report.outcome != "passed":
            self.outcomes[name] = report.outcome
        else:
            self.outcomes.setdefault(name, "passed")
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            self.reasons[name] = str(report.longrepr[2])


def main(report: Path, arguments: list[str]) -> int:
    found = Outcomes()
    status = pytest.main(arguments, plugins=[found])
    imported = [name for name in SLOW_PACKAGES if name in sys.modules]
    report.write_text(json.dumps({**vars(found), "imported": imported}))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
