"""Helpers that tests import as `support.<module>`; nothing here is collected as a test."""

from __future__ import annotations

import os
from typing import Final

__all__ = ["IS_LONG", "scaled"]

# `make test-long` sets this: the same test code with the full counts.
IS_LONG: Final = os.environ.get("WEIGHTSYNC_TEST_TIER", "short") == "long"


def scaled(short: int, long: int) -> int:
    """A count for this run: `short` in `make test`, `long` in `make test-long`."""
    return long if IS_LONG else short
