"""Many small versions over one binding: memory and objects stay as they are."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from support import scaled
from support.fabrics import CASES, Case, Link, address_of, random_bytes, rows, settle
from weightsync.transport.native import live_object_count
from weightsync.units import MIB

WAIT_S = 10.0
NUM_VERSIONS = scaled(2_000, 100_000)
WARM_UP = NUM_VERSIONS // 10
PAGE_BYTES = 4096
LOCAL = [case for case in CASES if case.name.startswith("local")]


@pytest.fixture(params=LOCAL, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.mark.timeout(600)
def test_memory_is_flat_over_many_small_versions(link: Link) -> None:
    buckets, chunks, nbytes = 4, 3, 40
    target, view, remote = link.connected(buckets * chunks * nbytes, [chunks] * (2 * buckets))
    payload = link.source_array(random_bytes(view.nbytes))
    table = rows(
        *[
            (
                address_of(payload) + at * nbytes,
                at * nbytes,
                nbytes,
                at // chunks << 8 | at % chunks,
            )
            for at in range(buckets * chunks)
        ]
    )
    tables = [table, table + np.array([0, 0, 0, buckets << 8])]
    slots = [list(range(buckets)), list(range(buckets, 2 * buckets))]
    objects = resident = 0
    for version in range(NUM_VERSIONS):
        if version == WARM_UP:
            gc.collect()
            objects, resident = live_object_count(), resident_bytes()
        parity = version % 2
        payload[0] = version % 251
        target.reset(slots[parity])
        remote.post(tables[parity]).wait(WAIT_S)
        target.wait(slots[parity], WAIT_S)
        assert target.poll() == slots[parity]
    gc.collect()
    settle(lambda: live_object_count() <= objects)  # the last operation's thread lets go of it
    assert live_object_count() <= objects
    assert resident_bytes() - resident < 2 * MIB
    assert np.array_equal(view, payload)
    assert target.counters()["arrivals"] == NUM_VERSIONS * buckets * chunks
    assert target.counters()["duplicates"] == 0
