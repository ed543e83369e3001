"""Every fault of the sim really happens, is counted, and repeats with its seed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support.fabrics import Bytes, address_of, no_leaks, random_bytes, rows
from weightsync.errors import (
    ConfigError,
    FencedError,
    PeerLostError,
    RailError,
    TransferTimeoutError,
)
from weightsync.transport.base import Engine, Remote, Target
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.sim import SimWire

CHUNKS = 64
CHUNK_BYTES = 128


class Rig:
    """One source, one sink, one slot of `CHUNKS` chunks; deterministic unless `blocking`."""

    def __init__(self, seed: int = 1, *, blocking: bool = False, **faults: Any) -> None:
        self.wire = SimWire(seed, blocking=blocking)
        self.source: Engine = open_fabric("sim", wire=self.wire, name="source")
        self.sink: Engine = open_fabric("sim", wire=self.wire, name="sink")
        self.view = np.zeros(CHUNKS * CHUNK_BYTES, np.uint8)
        self.memory = self.sink.register(address_of(self.view), self.view.nbytes, self.view)
        self.target = self.export(1)
        self.remote: Remote = self.source.connect(self.target.descriptor)
        self.payload = random_bytes(self.view.nbytes, seed=11)
        self.lease = self.source.register(
            address_of(self.payload), self.payload.nbytes, self.payload
        )
        self.wire.set_faults(**faults)

    def export(self, generation: int) -> Target:
        ranges = [(0, self.memory, 0, self.view.nbytes)]
        return self.sink.export(ranges, [CHUNKS], 8, generation)

    def table(self) -> Any:
        return rows(
            *[
                (address_of(self.payload) + i * CHUNK_BYTES, i * CHUNK_BYTES, CHUNK_BYTES, i)
                for i in range(CHUNKS)
            ]
        )

    def close(self) -> None:
        self.source.close()
        self.sink.close()


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_leaks():
        yield


def history(seed: int) -> tuple[list[Bytes], dict[str, int], list[list[int]]]:
    """Everything that can be seen of one run, step by step."""
    rig = Rig(seed, reorder=True, delay_s=1e-3, duplicate=0.2, late=0.1, invisible=0.2, late_s=0.01)
    operation = rig.remote.post(rig.table())
    views, missing = [], []
    while rig.wire.step():
        views.append(rig.view.copy())
        missing.append(rig.target.missing(0))
    assert operation.done
    counts = rig.wire.counts()
    rig.close()
    return views, counts, missing


def test_one_seed_is_one_history() -> None:
    first, again, other = history(5), history(5), history(6)
    assert first[1:] == again[1:]
    assert all(np.array_equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert first[2] != other[2]


def test_order_is_kept_unless_reordered() -> None:
    for reorder in (False, True):
        rig = Rig(reorder=reorder)
        rig.remote.post(rig.table())
        arrived: list[int] = []
        while rig.wire.step():
            arrived += [c for c in range(CHUNKS) if c not in rig.target.missing(0) + arrived]
        assert (arrived == sorted(arrived)) is not reorder
        assert (rig.wire.counts()["reordered"] > 0) is reorder
        assert np.array_equal(rig.view, rig.payload)
        rig.close()


def test_duplicates_land_again_with_the_first_bytes() -> None:
    rig = Rig(duplicate=1.0, late_s=1.0)
    rig.remote.post(rig.table()).wait(0.5)
    original = rig.payload.copy()
    rig.payload[:] = 0  # the operation is done: the source may change
    rig.lease.release()
    rig.wire.run()
    assert rig.wire.counts()["duplicated"] == CHUNKS
    assert rig.target.counters()["duplicates"] == CHUNKS
    assert rig.target.counters()["arrivals"] == CHUNKS
    assert np.array_equal(rig.view, original)
    rig.close()


def test_a_dropped_write_fails_the_operation_when_all_others_are_settled() -> None:
    rig = Rig(seed=4, drop=0.2)
    operation = rig.remote.post(rig.table())
    with pytest.raises(RailError, match="dropped") as lost:
        operation.wait(1.0)
    assert lost.value.rail == "sim"
    assert lost.value.slot == 0
    dropped = rig.wire.counts()["dropped"]
    assert 0 < dropped < CHUNKS
    assert len(rig.target.missing(0)) == dropped
    assert lost.value.chunk in rig.target.missing(0)
    assert rig.wire.num_pending == 0
    rig.wire.set_faults()
    rig.remote.post(rig.table()).wait(1.0)  # sending all again is safe
    assert rig.target.counters()["duplicates"] == CHUNKS - dropped
    assert np.array_equal(rig.view, rig.payload)
    rig.close()


def test_a_late_write_lands_after_its_error_unless_it_was_fenced() -> None:
    for fenced in (False, True):
        rig = Rig(late=1.0, late_s=2.0)
        with pytest.raises(RailError, match="may still land"):
            rig.remote.post(rig.table()).wait(1.0)
        assert not rig.view.any()
        if fenced:
            rig.target.fence()
        rig.wire.run()
        counts = rig.wire.counts()
        assert counts["late"] == counts["late_landed"] == CHUNKS
        assert counts["fenced"] == (CHUNKS if fenced else 0)
        assert rig.view.any() is not np.bool_(fenced)
        rig.close()


def test_a_resent_write_lands_twice_before_its_operation_is_done() -> None:
    rig = Rig(resend=1.0, rails=2, late_s=1.0)
    operation = rig.remote.post(rig.table())
    while not operation.done:
        if rig.wire.counts()["delivered"] == CHUNKS:
            assert rig.target.is_complete([0])  # long before it is done
        assert rig.wire.step()
    counts = rig.wire.counts()
    assert counts["resent"] == CHUNKS
    assert counts["delivered"] == 2 * CHUNKS
    assert rig.target.counters()["duplicates"] == CHUNKS
    assert rig.target.counters()["arrivals"] == CHUNKS
    assert rig.wire.num_pending == 0  # F1: nothing lands after it
    assert np.array_equal(rig.view, rig.payload)
    rig.close()


def test_a_frozen_rail_holds_its_share_only() -> None:
    rig = Rig(rails=4)
    operation = rig.remote.post(rig.table())
    rig.wire.freeze("source", rail=2)
    rig.wire.run()
    assert rig.target.missing(0) == list(range(2, CHUNKS, 4))
    assert rig.wire.counts()["held"] == CHUNKS // 4
    assert not operation.done
    rig.wire.thaw("source")
    operation.wait(1.0)
    assert np.array_equal(rig.view, rig.payload)
    with pytest.raises(ConfigError, match="numbered from 0"):
        rig.wire.freeze("source", rail=-1)
    rig.close()


def test_invisible_bytes_never_cover_newer_ones() -> None:
    rig = Rig(invisible=1.0)
    rig.remote.post(rig.table()).wait(1.0)
    rig.wire.set_faults()
    rig.payload[:] = 7
    rig.remote.post(rig.table()).wait(1.0)
    assert (rig.view == 7).all()
    rig.target.flush()
    assert (rig.view == 7).all()
    rig.close()


def test_bytes_may_come_after_their_count() -> None:
    rig = Rig(invisible=1.0)
    rig.remote.post(rig.table()).wait(1.0)
    rig.target.wait([0], 1.0)
    assert not rig.view.any()
    rig.target.flush()
    assert np.array_equal(rig.view, rig.payload)
    assert rig.wire.counts()["invisible"] == rig.wire.counts()["flushed"] == CHUNKS
    rig.close()


def test_a_source_is_read_when_its_write_is_delivered() -> None:
    rig = Rig()
    rig.remote.post(rig.table())
    for _ in range(CHUNKS // 2):
        rig.wire.step()
    before = rig.payload.copy()
    rig.payload[:] = 0
    rig.wire.run()
    half = rig.view.nbytes // 2
    assert np.array_equal(rig.view[:half], before[:half])
    assert not rig.view[half:].any()
    rig.close()


def test_a_frozen_engines_writes_land_after_the_thaw_unless_fenced() -> None:
    for fenced in (False, True):
        rig = Rig()
        operation = rig.remote.post(rig.table())
        rig.wire.freeze("source")
        with pytest.raises(TransferTimeoutError):
            operation.wait(60.0)
        assert rig.wire.now_s >= 60.0
        assert rig.wire.counts()["held"] == CHUNKS
        with pytest.raises(TransferTimeoutError):
            rig.lease.release(1.0)
        if fenced:
            rig.target.fence()
            rig.target = rig.export(2)
        rig.wire.thaw("source")
        if fenced:
            with pytest.raises(FencedError):
                operation.wait(1.0)
            assert not rig.view.any()
            assert rig.target.missing(0) == list(range(CHUNKS))
            assert rig.wire.counts()["fenced"] == CHUNKS
        else:
            operation.wait(1.0)
            assert np.array_equal(rig.view, rig.payload)
        rig.lease.release()
        rig.close()


def test_a_killed_sink_is_lost_and_a_killed_source_goes_silent() -> None:
    rig = Rig()
    rig.wire.kill("sink")
    with pytest.raises(PeerLostError, match="sink"):
        rig.remote.post(rig.table()).wait(1.0)
    assert not rig.view.any()
    rig.close()
    rig = Rig()
    operation = rig.remote.post(rig.table())
    for _ in range(10):
        rig.wire.step()
    rig.wire.kill("source")
    rig.wire.run()
    assert len(rig.target.missing(0)) == CHUNKS - 10
    assert not operation.done
    assert rig.wire.counts()["killed"] == CHUNKS - 10
    rig.close()


def test_faults_of_one_engine_leave_the_others_alone() -> None:
    rig = Rig()
    other = open_fabric("sim", wire=rig.wire, name="other")
    lease = other.register(address_of(rig.payload), rig.payload.nbytes, rig.payload)
    rig.wire.set_faults("source", drop=1.0)
    with pytest.raises(RailError):
        rig.remote.post(rig.table()).wait(1.0)
    other.connect(rig.target.descriptor).post(rig.table()).wait(1.0)
    assert np.array_equal(rig.view, rig.payload)
    lease.release()
    other.close()
    rig.close()


def test_time_moves_only_when_told() -> None:
    rig = Rig(delay_s=1.0, reorder=True)
    operation = rig.remote.post(rig.table())
    assert rig.wire.now_s == 0.0
    rig.wire.run_until(0.5)
    assert rig.wire.now_s == 0.5
    assert 0 < len(rig.target.missing(0)) < CHUNKS
    assert rig.wire.num_pending == len(rig.target.missing(0))
    operation.wait(None)
    assert rig.wire.now_s < 1.1
    with pytest.raises(TransferTimeoutError):
        rig.export(2).wait([0], None)  # nothing is in flight: for ever is now
    rig.close()


def test_a_blocking_wire_waits_for_other_threads() -> None:
    rig = Rig(blocking=True)
    waiter = threading.Thread(target=rig.target.wait, args=([0], 10.0))
    waiter.start()
    rig.remote.post(rig.table())
    waiter.join(10.0)
    assert not waiter.is_alive()
    assert rig.target.is_complete([0])
    rig.close()


def test_wires_do_not_mix_and_bad_settings_are_refused() -> None:
    rig, other = Rig(), Rig()
    with pytest.raises(ConfigError, match="another simulated wire"):
        other.source.connect(rig.target.descriptor)
    with pytest.raises(ConfigError, match="already attached"):
        rig.wire.open("source")
    for bad in (
        {"drop": 1.5},
        {"duplicate": -0.1},
        {"late": float("nan")},
        {"delay_s": -1.0},
        {"rails": 0},
    ):
        with pytest.raises(ConfigError):
            rig.wire.set_faults(**bad)
    with pytest.raises(ConfigError, match="needs a wire"):
        open_fabric("sim")
    rig.close()
    other.close()
