"""The contract of weightsync/transport/base.py, over every fabric."""

from __future__ import annotations

import ctypes
import threading
import weakref

import numpy as np
import pytest

from support.fabrics import (
    ALL_CASES,
    CASES,
    Bytes,
    Case,
    Link,
    address_of,
    arrive,
    random_bytes,
    rows,
    settle,
)
from weightsync.errors import ConfigError, FencedError, TransferTimeoutError, WeightSyncError

WAIT_S = 10.0


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_the_fabric_is_part_of_this_run(case: Case) -> None:
    if (problem := case.problem()) is not None:
        pytest.skip(f"{case.name}: {problem}")
    assert case in CASES


@pytest.mark.parametrize("nbytes", [0, 1, 3, 4095, 4096, 65537, (1 << 20) + 1, (5 << 20) + 3])
def test_a_write_of_any_length_lands_exactly(link: Link, nbytes: int) -> None:
    offset = 13  # odd on purpose: nothing may need alignment
    target, view, remote = link.connected(nbytes + 64, [1])
    payload = link.source_array(random_bytes(nbytes + 7))
    remote.post(rows((address_of(payload) + 7, offset, nbytes, 0))).wait(WAIT_S)
    arrive(target, [0])
    assert np.array_equal(view[offset : offset + nbytes], payload[7:])
    assert not view[:offset].any()
    assert not view[offset + nbytes :].any()


def test_many_writes_land_each_in_its_place(link: Link) -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(0, 700, 3000)
    payload = link.source_array(random_bytes(int(sizes.sum())))
    expected = np.zeros(2 * payload.nbytes + 64, np.uint8)
    table, source_at, sink_at = [], 0, 5
    for number, size in enumerate(sizes.tolist()):
        table.append((address_of(payload) + source_at, sink_at, size, number))
        expected[sink_at : sink_at + size] = payload[source_at : source_at + size]
        source_at += size
        sink_at += size + number % 2  # gaps must stay untouched
    target, view, remote = link.connected(expected.nbytes, [3000], chunk_bits=12)
    order = rng.permutation(len(table))
    remote.post(rows(*[table[i] for i in order])).wait(WAIT_S)
    arrive(target, [0])
    assert np.array_equal(view, expected)
    counters = target.counters()
    assert counters["arrivals"] == 3000
    assert counters["bytes_arrived"] >= payload.nbytes
    assert remote.counters()["writes"] == 3000
    assert remote.counters()["bytes_written"] == payload.nbytes


def test_a_slot_is_complete_with_its_last_chunk_in_any_order(link: Link) -> None:
    chunks = 130  # three words of bits
    target, view, remote = link.connected(chunks * 16, [chunks, 1])
    payload = link.source_array(random_bytes(chunks * 16))
    order = np.random.default_rng(5).permutation(chunks).tolist()
    for chunk in order[:-1]:
        remote.post(rows((address_of(payload) + chunk * 16, chunk * 16, 16, chunk))).wait(WAIT_S)
    settle(lambda: len(target.missing(0)) == 1)
    assert target.missing(0) == [order[-1]]
    assert not target.is_complete([0])
    assert target.poll() == []
    last = order[-1]
    remote.post(rows((address_of(payload) + last * 16, last * 16, 16, last))).wait(WAIT_S)
    assert target.poll(WAIT_S) == [0]
    assert target.poll() == []
    assert target.is_complete([0])
    assert target.missing(1) == [0]
    target.flush()
    assert np.array_equal(view, payload)


def test_writers_on_many_threads_complete_every_slot_once(link: Link) -> None:
    num_slots, chunks, nbytes = 8, 40, 257
    target, view, remote = link.connected(num_slots * chunks * nbytes, [chunks] * num_slots)
    payload = link.source_array(random_bytes(view.nbytes))

    def write(thread: int) -> None:
        for chunk in range(thread, chunks, 4):
            table = [
                (address_of(payload) + at, at, nbytes, slot << 8 | chunk)
                for slot in range(num_slots)
                for at in [(slot * chunks + chunk) * nbytes]
            ]
            remote.post(rows(*table)).wait(WAIT_S)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    seen: list[int] = []
    while len(seen) < num_slots:
        fresh = target.poll(WAIT_S)
        assert fresh
        seen += fresh
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(num_slots))
    target.flush()
    assert np.array_equal(view, payload)
    assert target.counters()["arrivals"] == num_slots * chunks


def test_a_second_arrival_changes_nothing_and_is_counted(case: Case, link: Link) -> None:
    target, view, remote = link.connected(32, [2])
    payload = link.source_array(random_bytes(32))
    first = rows((address_of(payload), 0, 16, 0))
    for _ in range(3):
        remote.post(first).wait(WAIT_S)
    settle(lambda: target.missing(0) == [1])
    assert target.missing(0) == [1]
    remote.post(rows((address_of(payload) + 16, 16, 16, 1))).wait(WAIT_S)
    arrive(target, [0])
    assert np.array_equal(view, payload)
    duplicates = target.counters()["duplicates"]
    assert duplicates >= 2 if case.has_duplicates else duplicates == 2
    assert link.sink.counters()["duplicates"] == target.counters()["duplicates"]


def test_chunks_that_arrive_before_anybody_waits_are_kept(link: Link) -> None:
    target, view, remote = link.connected(64, [1, 1])
    payload = link.source_array(random_bytes(64))
    remote.post(rows((address_of(payload), 0, 64, 1 << 8))).wait(WAIT_S)
    arrive(target, [1])
    assert np.array_equal(view, payload)
    with pytest.raises(TransferTimeoutError):
        target.wait([0], 0.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 100, 29, 1), "leaves the exported ranges"),  # past the end
        ((0, 128, 1, 1), "leaves the exported ranges"),
        ((0, 40, 16, 1), "leaves the exported ranges"),  # into a gap
        ((0, -8, 8, 1), "leaves the exported ranges"),
        ((0, 0, -1, 1), "leaves the exported ranges"),
        ((0, 1 << 62, 1 << 62, 1), "leaves the exported ranges"),
        ((0, 0, 8, -2), "immediate -2"),
        ((0, 0, 8, 1 << 31), "immediate 2147483648"),
        ((60, 0, 8, 1), "no live lease"),  # half outside the source's lease
        ((1 << 40, 0, 8, 1), "no live lease"),
        ((-8, 0, 16, 1), "no live lease"),
    ],
)
def test_a_bad_row_refuses_the_whole_batch(
    link: Link, row: tuple[int, int, int, int], message: str
) -> None:
    memory, view = link.memory(128)
    ranges = [(0, memory, 0, 48), (64, memory, 64, 64)]
    target = link.sink.export(ranges, [4], 8, 1)
    remote = link.source.connect(target.descriptor, WAIT_S)
    assert remote.nbytes == 128
    payload = link.source_array(random_bytes(64))
    good = (address_of(payload), 0, 8, 0)
    bad = (address_of(payload) + row[0], *row[1:])
    with pytest.raises(ConfigError, match=message) as raised:
        remote.post(rows(good, bad))
    assert raised.value.row == 1
    assert not view.any()
    assert target.missing(0) == [0, 1, 2, 3]
    assert remote.counters()["operations"] == 0


@pytest.mark.parametrize(
    "table",
    [
        np.zeros((2, 3), np.int64),
        np.zeros(4, np.int64),
        np.zeros((2, 4), np.int32),
        np.zeros((2, 4), np.float64),
        np.zeros((4, 4), np.int64).T[::2],
    ],
)
def test_a_table_of_another_shape_is_refused(link: Link, table: Bytes) -> None:
    target, _, remote = link.connected(64, [1])
    with pytest.raises(ConfigError, match=r"\(W, 4\)"):
        remote.post(table)  # type: ignore[arg-type]
    target.close()


def test_unknown_slots_and_chunks_are_counted_and_harm_nothing(case: Case, link: Link) -> None:
    target, view, remote = link.connected(64, [2, 2])
    payload = link.source_array(random_bytes(64))
    unknown = [2 << 8, 0 << 8 | 2, 1 << 8 | 255, (1 << 31) - 1]
    remote.post(rows(*[(address_of(payload), 0, 8, imm) for imm in unknown])).wait(WAIT_S)
    settle(lambda: target.counters()["protocol_errors"] >= 4)
    errors = target.counters()["protocol_errors"]
    assert errors >= 4 if case.has_duplicates else errors == 4
    assert target.counters()["arrivals"] == 0
    assert target.missing(0) == [0, 1]
    remote.post(rows((address_of(payload), 0, 64, 0), (0, 0, 0, 1))).wait(WAIT_S)
    arrive(target, [0])
    assert np.array_equal(view, payload)


def test_a_fence_cuts_off_writers_and_voids_arrivals(link: Link) -> None:
    target, view, remote = link.connected(64, [2, 1])
    payload = link.source_array(random_bytes(64))
    remote.post(rows((address_of(payload), 0, 32, 0))).wait(WAIT_S)
    target.flush()
    target.fence()
    before = view.copy()
    operation = remote.post(rows((address_of(payload) + 32, 32, 32, 1)))
    with pytest.raises(FencedError, match="generation 1"):
        operation.wait(WAIT_S)
    assert isinstance(operation.error, FencedError)
    assert np.array_equal(view, before)
    assert np.array_equal(view[:32], payload[:32])  # kept, unless discarded
    assert not target.is_open
    for call in (lambda: target.wait([0], 0.0), target.poll, lambda: target.missing(0)):
        with pytest.raises(FencedError, match="fenced"):
            call()
    target.fence()  # again: nothing happens


def test_a_waiter_learns_of_a_fence(link: Link) -> None:
    target, _, _ = link.connected(64, [1])
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            target.wait([0], WAIT_S)
        except WeightSyncError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    target.fence()
    thread.join(WAIT_S)
    assert [type(error) for error in raised] == [FencedError]


def test_memory_goes_on_under_a_new_generation(link: Link) -> None:
    memory, view = link.memory(64)
    old = link.sink.export([(0, memory, 0, 64)], [1], 8, 1)
    stale = link.source.connect(old.descriptor, WAIT_S)
    descriptor = old.descriptor
    old.fence(discard=True)
    new = link.sink.export([(0, memory, 0, 64)], [1], 8, 2)
    payload = link.source_array(random_bytes(64))
    with pytest.raises(FencedError):
        stale.post(rows((address_of(payload), 0, 64, 0))).wait(WAIT_S)
    with pytest.raises(FencedError):
        link.source.connect(descriptor, WAIT_S)
    assert new.missing(0) == [0]
    remote = link.source.connect(new.descriptor, WAIT_S)
    assert remote.generation == 2
    remote.post(rows((address_of(payload), 0, 64, 0))).wait(WAIT_S)
    arrive(new, [0])
    assert np.array_equal(view, payload)


def test_slots_are_reset_and_used_again(link: Link) -> None:
    target, view, remote = link.connected(64, [1, 1])
    for version in range(5):
        slot = version % 2
        payload = link.source_array(random_bytes(64, seed=version))
        remote.post(rows((address_of(payload), 0, 64, slot << 8))).wait(WAIT_S)
        arrive(target, [slot])
        assert target.poll() == [slot]
        assert np.array_equal(view, payload)
        if link.wire is not None:
            link.wire.run()  # "closed" means that no second landing is on its way either
        target.reset([slot])
        assert target.missing(slot) == [0]


def test_a_timeout_names_slots_and_chunks(link: Link) -> None:
    target, _, remote = link.connected(64, [5, 1, 3])
    payload = link.source_array(random_bytes(64))
    remote.post(rows((address_of(payload), 0, 8, 1), (address_of(payload), 0, 8, 1 << 8))).wait(5)
    settle(lambda: target.is_complete([1]) and len(target.missing(0)) == 4)
    with pytest.raises(TransferTimeoutError, match=r"slot 0 lacks chunks 0, 2-4 \(4 of 5\)") as one:
        target.wait([0, 1, 2], 0.01)
    assert (one.value.slot, one.value.chunks, one.value.slots) == (0, [0, 2, 3, 4], [0, 2])
    assert isinstance(one.value, TimeoutError)
    with pytest.raises(ConfigError, match="slot 3 does not exist"):
        target.wait([3], 0.0)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="timeout"):
            target.wait([0], bad)


def test_a_lease_ends_when_released_and_lets_its_owner_go(link: Link) -> None:
    class Owner:
        pass

    target, _, remote = link.connected(64, [1])
    payload = random_bytes(64)
    owner = Owner()
    gone = weakref.ref(owner)
    lease = link.source.register(address_of(payload), 64, owner)
    del owner
    remote.post(rows((address_of(payload), 0, 64, 0))).wait(WAIT_S)
    assert gone() is not None
    lease.release()
    assert gone() is None
    lease.release()
    with pytest.raises(ConfigError, match="no live lease"):
        remote.post(rows((address_of(payload), 0, 64, 0)))
    target.close()


def test_overlapping_leases_hold_independently(link: Link) -> None:
    target, _, remote = link.connected(64, [1])
    payload = random_bytes(64)
    small = link.source.register(address_of(payload) + 8, 8, payload)
    large = link.source.register(address_of(payload), 64, payload)
    twin = link.source.register(address_of(payload), 64, payload)
    table = rows((address_of(payload) + 8, 0, 40, 0))
    remote.post(table).wait(WAIT_S)
    large.release()
    remote.post(table).wait(WAIT_S)
    twin.release()
    with pytest.raises(ConfigError, match="no live lease"):
        remote.post(table)
    remote.post(rows((address_of(payload) + 8, 0, 8, 0))).wait(WAIT_S)
    small.release()
    target.close()


def test_exported_memory_cannot_be_released(case: Case, link: Link) -> None:
    array = np.zeros(64, np.uint8)
    lease = link.sink.register(address_of(array), 64, array)
    if not case.takes_leases:
        with pytest.raises(ConfigError, match="engine allocated"):
            link.sink.export([(0, lease, 0, 64)], [1], 8, 1)
        return
    target = link.sink.export([(0, lease, 0, 64)], [1], 8, 1)
    with pytest.raises(ConfigError, match="exported by an open target"):
        lease.release()
    target.close()
    lease.release()


def test_allocated_memory_is_a_source_and_belongs_to_one_open_target(link: Link) -> None:
    staging = link.source.allocate(4096)
    np.frombuffer(staging, np.uint8)[:] = 7
    target, view, remote = link.connected(64, [1])
    remote.post(rows((staging.address + 8, 0, 64, 0))).wait(WAIT_S)
    arrive(target, [0])
    assert (view == 7).all()
    memory = link.sink.allocate(64)
    first = link.sink.export([(0, memory, 0, 64)], [1], 8, 1)
    with pytest.raises(ConfigError, match="already exported"):
        link.sink.export([(0, memory, 0, 64)], [1], 8, 1)
    first.close()
    link.sink.export([(0, memory, 0, 64)], [1], 8, 2).close()


def test_an_arena_of_several_memories_and_many_sources(link: Link) -> None:
    parts = [link.memory(64) for _ in range(3)]
    ranges = [(256 * i, memory, 16, 48) for i, (memory, _) in enumerate(parts)]
    target = link.sink.export(ranges, [3] * 4, 8, 1)
    payload = link.source_array(random_bytes(48 * 4))
    remotes = [link.source.connect(target.descriptor, WAIT_S) for _ in range(4)]
    for number, remote in enumerate(remotes):
        table = [
            (address_of(payload) + number * 48 + 12 * number, 256 * i + 12 * number, 12, imm)
            for i in range(3)
            for imm in [number << 8 | i]
        ]
        remote.post(rows(*table)).wait(WAIT_S)
    arrive(target, [0, 1, 2, 3])
    expected = np.concatenate([payload[60 * i : 60 * i + 12] for i in range(4)])
    for _, view in parts:
        assert np.array_equal(view[16:], expected)
        assert not view[:16].any()


def test_an_engine_is_source_and_sink_at_once(link: Link) -> None:
    target, view = link.target(64, [1])
    remote = link.sink.connect(target.descriptor, WAIT_S)
    payload = random_bytes(64)
    lease = link.sink.register(address_of(payload), 64, payload)
    remote.post(rows((address_of(payload), 0, 64, 0))).wait(WAIT_S)
    arrive(target, [0])
    assert np.array_equal(view, payload)
    lease.release()


def test_bytes_stored_through_the_mapping_are_announced(link: Link) -> None:
    target, view, remote = link.connected(4096, [2])
    if remote.address is None:
        with pytest.raises(ConfigError, match="nothing to announce"):
            remote.notify(np.array([0], np.int32))
        return
    payload = random_bytes(4096)
    ctypes.memmove(remote.address, address_of(payload), 4096)
    assert target.missing(0) == [0, 1]
    remote.notify(np.array([0, 1], np.int32), nbytes=4096)
    arrive(target, [0])
    assert np.array_equal(view, payload)
    assert remote.counters()["notifies"] == 2
    target.fence()
    with pytest.raises(FencedError):
        remote.notify([0])
    remote.close()
    assert remote.address is None


@pytest.mark.parametrize(
    ("slots", "chunk_bits"),
    [([0], 4), ([17], 4), ([-1], 4), ([1], 40), ([1], -1), ([1] * 9, 28), ([1.5], 4), (["x"], 4)],
)
def test_bad_slot_tables_are_refused(link: Link, slots: list[int], chunk_bits: int) -> None:
    memory, _ = link.memory(64)
    with pytest.raises(ConfigError):
        link.sink.export([(0, memory, 0, 64)], slots, chunk_bits, 1)


@pytest.mark.parametrize(
    "ranges",
    [[(0, 0, 65)], [(0, 64, 1)], [(0, 0, 0)], [(0, 0, 32), (16, 32, 32)], [(-1, 0, 8)]],
)
def test_bad_ranges_are_refused(link: Link, ranges: list[tuple[int, int, int]]) -> None:
    memory, _ = link.memory(64)
    with pytest.raises(ConfigError):
        link.sink.export([(at, memory, off, n) for at, off, n in ranges], [1], 4, 1)
    link.sink.export([(0, memory, 0, 64)], [1], 4, 1).close()  # nothing was left taken


def test_damaged_descriptors_are_refused_by_type(link: Link) -> None:
    target, _ = link.target(64, [1])
    good = target.descriptor
    for cut in range(len(good)):
        with pytest.raises(WeightSyncError):
            link.source.connect(good[:cut], 1.0)
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 0x55
        try:
            link.source.connect(bytes(bad), 1.0).close()
        except WeightSyncError:
            continue
    with pytest.raises(ConfigError):
        link.source.connect(good + b"x", 1.0)
    link.source.connect(good, WAIT_S).close()


def test_closed_things_say_so(link: Link) -> None:
    target, _, remote = link.connected(64, [1])
    payload = link.source_array(random_bytes(64))
    table = rows((address_of(payload), 0, 64, 0))
    remote.close()
    remote.close()
    with pytest.raises(ConfigError, match="closed"):
        remote.post(table)
    target.close()
    target.close()
    with pytest.raises(ConfigError, match="closed"):
        target.wait([0], 0.0)
    link.sink.close()
    with pytest.raises(ConfigError, match="closed"):
        link.sink.allocate(64)


def test_posting_to_a_closed_target_fails_the_operation(link: Link) -> None:
    target, view, remote = link.connected(64, [1])
    payload = link.source_array(random_bytes(64))
    target.close()
    with pytest.raises(WeightSyncError):
        remote.post(rows((address_of(payload), 0, 64, 0))).wait(WAIT_S)
    assert not view.any()


def test_counters_of_an_engine_outlive_its_targets(link: Link) -> None:
    target, _, remote = link.connected(64, [1])
    payload = link.source_array(random_bytes(64))
    remote.post(rows((address_of(payload), 0, 64, 0))).wait(WAIT_S)
    target.wait([0], WAIT_S)
    target.close()
    remote.close()
    assert link.sink.counters()["arrivals"] == 1
    assert link.source.counters()["bytes_written"] == 64
    assert link.source.counters()["operations"] == 1
