"""Settings of every test run; helpers live in `support`, never here."""

from __future__ import annotations

import gc

from hypothesis import settings

from support import IS_LONG

# No deadline: how long one example takes says nothing on a shared machine. Short runs repeat
# exactly, so that a failure in CI is the same failure at home; long runs look for new ones.
settings.register_profile("short", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("long" if IS_LONG else "short")


def pytest_collection_finish() -> None:
    """What was imported and collected stays: later collections of garbage need not look at it."""
    gc.collect()
    gc.freeze()
