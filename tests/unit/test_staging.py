from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.errors import PlanBudgetError, TransferTimeoutError
from weightsync.runtime.staging import StagingPool


def _soon() -> float:
    return time.monotonic() + 5.0


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=60))
def test_ranges_never_overlap_and_never_exceed_the_budget(steps: list[tuple[int, bool]]) -> None:
    pool = StagingPool(1024)
    held: list[tuple[int, int]] = []
    cancel = threading.Event()
    cancel.set()  # never block: None means full
    for size, give_back in steps:
        if give_back and held:
            pool.release(*held.pop(0))
        offset = pool.acquire(size, deadline=_soon(), cancel=cancel)
        if offset is None or size == 0:
            continue
        assert offset + size <= 1024
        assert all(offset + size <= o or o + s <= offset for o, s in held)
        held.append((offset, size))
    assert pool.peak_bytes <= 1024


def test_a_bucket_larger_than_the_budget_is_refused_with_numbers() -> None:
    with pytest.raises(PlanBudgetError, match=r"2048 bytes.*budget is 1024"):
        StagingPool(1024).acquire(2048, deadline=_soon(), cancel=threading.Event())


def test_waiting_ends_when_a_range_comes_back() -> None:
    pool = StagingPool(128)
    first = pool.acquire(128, deadline=_soon(), cancel=threading.Event())
    assert first == 0
    threading.Timer(0.02, pool.release, (0, 128)).start()
    assert pool.acquire(64, deadline=_soon(), cancel=threading.Event()) == 0


def test_waiting_ends_at_the_deadline() -> None:
    pool = StagingPool(128)
    pool.acquire(128, deadline=_soon(), cancel=threading.Event())
    with pytest.raises(TransferTimeoutError, match="staging"):
        pool.acquire(1, deadline=time.monotonic() + 0.02, cancel=threading.Event())
