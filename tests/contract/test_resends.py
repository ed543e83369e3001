"""Writes that were delivered but not acknowledged are sent again on another rail.

Meanwhile chunks on a rail that stands still are held back. By their number the arrivals would fill
a bucket; by its bits it stays open until the held chunk is there.
"""

from __future__ import annotations

import numpy as np
import pytest

from support import scaled
from support.fabrics import address_of, no_leaks, random_bytes
from weightsync.transport.base import Pages
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.sim import SimWire

NUM_SEEDS = scaled(50, 1000)
CHUNK_BYTES = 16


def run(seed: int) -> dict[str, int]:
    """One version of several buckets; returns how often what was tested for happened."""
    rng = np.random.default_rng(seed)
    chunks = rng.integers(1, 9, rng.integers(1, 6))
    rails = int(rng.integers(2, 5))
    wire = SimWire(seed, blocking=False)
    wire.set_faults(
        reorder=bool(rng.integers(2)),
        delay_s=1e-4,
        rails=rails,
        resend=float(rng.uniform(0.3, 1.0)),
        late_s=1e-3,
    )
    source = open_fabric("sim", wire=wire, name="source")
    sink = open_fabric("sim", wire=wire, name="sink")
    count = int(chunks.sum())
    view = np.zeros(count * CHUNK_BYTES, np.uint8)
    memory = sink.register(address_of(view), view.nbytes, view)
    target = sink.export([(0, memory, 0, view.nbytes)], chunks, 4, 1)
    remote = source.connect(target.descriptor)
    payload = random_bytes(view.nbytes, seed)
    payload |= 1  # no chunk reads as zero
    lease = source.register(address_of(payload), payload.nbytes, payload)

    bucket = np.repeat(np.arange(chunks.size), chunks)
    chunk = np.concatenate([np.arange(n) for n in chunks])
    order = rng.permutation(count)
    wire.freeze("source", rail=int(rng.integers(rails)))
    operations = []
    for part in np.array_split(order, rng.integers(1, 4)):
        pages = Pages(part, CHUNK_BYTES, address_of(payload))
        immediates = bucket[part] << 4 | chunk[part]
        operations.append(
            remote.write_paged(CHUNK_BYTES, pages, Pages(part, CHUNK_BYTES, 0), immediates)
        )
    seen = {"early by count": 0, "held": 0}

    def look() -> None:
        there = (view.reshape(count, CHUNK_BYTES) == payload.reshape(count, CHUNK_BYTES)).all(1)
        for number in range(chunks.size):
            mine = there[bucket == number]
            assert target.is_complete([number]) == mine.all(), (seed, number)
            assert target.missing(number) == np.flatnonzero(~mine).tolist(), (seed, number)
        counters = target.counters()
        assert counters["arrivals"] == there.sum(), seed  # no bucket has an excess
        assert counters["duplicates"] <= wire.counts()["resent"], seed
        came = counters["arrivals"] + counters["duplicates"]
        seen["early by count"] += int(came >= count and not there.all())

    while wire.step():
        look()
    held = wire.counts()["held"]
    seen["held"] = held
    assert all(operation.done for operation in operations) == (held == 0)
    wire.thaw("source")
    while wire.step():
        look()
    for operation in operations:
        operation.wait(0.0)
    target.wait(np.arange(chunks.size), 0.0)
    assert sorted(target.poll()) == list(range(chunks.size))
    assert np.array_equal(view, payload)
    counters = target.counters()
    assert counters["arrivals"] == count
    assert counters["duplicates"] == wire.counts()["resent"]
    assert counters["protocol_errors"] == 0
    seen["resent"] = wire.counts()["resent"]
    lease.release(0.0)
    source.close()
    sink.close()
    return seen


@pytest.mark.timeout(600)  # the long tier
def test_no_bucket_is_complete_early_or_has_an_excess() -> None:
    totals: dict[str, int] = {}
    with no_leaks():
        for seed in range(NUM_SEEDS):
            for name, count in run(seed).items():
                totals[name] = totals.get(name, 0) + count
    # What it is about really happened: counting arrivals would have been wrong.
    assert totals["early by count"] > NUM_SEEDS // 10, totals
    assert totals["held"] > NUM_SEEDS, totals
    assert totals["resent"] > NUM_SEEDS, totals
