"""Defects of the published engine that must not occur here; one test for each, over every fabric.

B1 .. B8 are numbered as in its list of facts (design/, `transferengine.md` 2.4); the others are
from what is said there about counters and errors.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from support.fabrics import (
    CASES,
    Bytes,
    Case,
    Link,
    address_of,
    arrive,
    groups,
    no_leaks,
    random_bytes,
    rows,
)
from weightsync.errors import (
    ConfigError,
    MembershipError,
    RailError,
    TransferError,
    TransferTimeoutError,
    WeightSyncError,
)
from weightsync.transport.base import COUNTER, Pages
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.sim import SimWire
from weightsync.units import GIB, MIB

WAIT_S = 20.0


def test_b1_odd_numbers_of_pages_leave_later_writes_where_they_belong(link: Link) -> None:
    """There, a single-page write turned the round robin and the next write took a wrong key."""
    made = [link.target(4096, [40]) for _ in range(2)]
    remotes = [link.source.connect(target.descriptor, WAIT_S) for target, _ in made]
    payload = link.source_array(random_bytes(4096))
    at = address_of(payload)
    chunk = 0
    for size in (1, 1, 3, 1, 5, 1, 1, 7):
        for remote in remotes:
            pages = Pages(np.arange(size), 100, at + chunk * 100)
            remote.write_paged(100, pages, Pages(np.arange(size), 100, chunk * 100), chunk)
            after = chunk + size
            remote.post(rows((at + after * 100, after * 100, 100, after)))
        chunk += size + 1
    remotes[0].post(rows((at + chunk * 100, chunk * 100, 4096 - chunk * 100, chunk)))
    remotes[1].post(rows((at + chunk * 100, chunk * 100, 4096 - chunk * 100, chunk)))
    rest = [(0, 0, 0, number) for number in range(chunk + 1, 40)]
    for remote, (target, view) in zip(remotes, made, strict=True):
        remote.post(rows(*rest)).wait(WAIT_S)
        arrive(target, [0])
        assert np.array_equal(view, payload)


# There: 98 sizes below 400 kB over 2, 3 and 4 shards, and with them every multiple of a page and a
# remainder; larger sizes reach the cuts that fabrics make by themselves.
B2_SIZES = [1, 2, 3, 8191, 8192, 8193, 16384, 16385, 24577, 32769, 32770, 32771, 65537, 98305]
B2_SIZES += [(1 << 20) - 1, (1 << 20) + 1, (4 << 20) + 3]


def test_b2_no_tail_is_cut_off_whatever_the_size_and_the_shards(link: Link) -> None:
    total = max(B2_SIZES)
    target, view, remote = link.connected(total + 8, [1, *range(1, 9)], chunk_bits=3)
    payload = link.source_array(random_bytes(total) | 1)
    at = address_of(payload)
    shards_of = {1: 1, 2: 2, 3: 3, 4: 4, 8: 8}
    for size in B2_SIZES:
        for shards in shards_of if size < MIB else (1, 3):
            view[:] = 0
            cuts = [size * i // shards for i in range(shards + 1)]
            table = [
                (at + low, low, high - low, shards << 3 | i)
                for i, (low, high) in enumerate(pairwise(cuts))
            ]
            operation = remote.post(rows(*table))
            operation.wait(WAIT_S)
            arrive(target, [shards])
            assert operation.nbytes == size
            assert np.array_equal(view[:size], payload[:size]), (size, shards)
            assert not view[size:].any(), (size, shards)
            if link.wire is not None:
                link.wire.run()  # second landings: the view is emptied and the slot used again
                target.flush()
            target.reset([shards])


def test_b3_what_is_told_to_several_peers_reaches_each_its_own(link: Link) -> None:
    """There, the peer's rail was chosen by the position in the list of peers."""
    count = 6
    made = [link.target(64, [1] * count) for _ in range(count)]
    remotes = [link.source.connect(target.descriptor, WAIT_S) for target, _ in made]
    for first in range(count):
        # Another part of the list each time, so that positions and peers differ.
        numbers = [(first + i) % count for i in range(3)]
        table = rows(*[(0, 0, 0, number << 8) for number in numbers])
        some = [remotes[number] for number in numbers]
        link.source.scatter(some, table, [0, 1, 2]).wait(WAIT_S)
    for number, (target, _) in enumerate(made):
        target.wait([number], WAIT_S)
        assert [target.is_complete([slot]) for slot in range(count)] == [
            slot == number for slot in range(count)
        ]


class Aliased:
    """`nbytes` of address space over a few MiB of memory, so that 5 GiB need none.

    Windows all show the same memory, but for those numbered in `own` and the last one.
    """

    WINDOW = 2 * MIB

    def __init__(self, nbytes: int, own: int) -> None:
        self.nbytes = nbytes
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_long,
        ]  # fmt: skip
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        windows = -(-nbytes // self.WINDOW)
        self._length = windows * self.WINDOW
        # Windows of the file: the common one, the one of its own, the last.
        file = os.memfd_create("aliased")
        os.ftruncate(file, 3 * self.WINDOW)
        self.address = self._map(None, self._length, 0, -1, 0)
        for number in range(windows):
            part = 1 if number == own else 2 if number == windows - 1 else 0
            self._map(
                self.address + number * self.WINDOW, self.WINDOW, 0x10, file, part * self.WINDOW
            )
        os.close(file)
        self.own = self._view(own)
        self.last = self._view(windows - 1)
        self.common = self._view(0)

    def _map(self, at: int | None, length: int, flags: int, file: int, offset: int) -> int:
        if file < 0:
            flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        else:
            flags |= mmap.MAP_SHARED | 0x8000  # MAP_POPULATE: page by page takes five times as long
        got = self._libc.mmap(at, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, offset)
        assert got not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        return int(got)

    def _view(self, window: int) -> Bytes:
        kind = ctypes.c_uint8 * self.WINDOW
        return np.frombuffer(kind.from_address(self.address + window * self.WINDOW), np.uint8)

    def close(self) -> None:
        del self.own, self.last, self.common
        assert self._libc.munmap(self.address, self._length) == 0


def write_5_gib() -> None:
    nbytes = 5 * GIB + 3
    beyond = 4 * GIB // Aliased.WINDOW + 1  # a window that a wrapped length does not reach
    link = next(case for case in CASES if case.name == "sim").open()
    source, sink = Aliased(nbytes, beyond), Aliased(nbytes, beyond)
    for number, part in enumerate((source.common, source.own, source.last)):
        part[:8192] = random_bytes(8192, number)
    read = link.source.register(source.address, nbytes)
    memory = link.sink.register(sink.address, nbytes)
    target = link.sink.export([(0, memory, 0, nbytes)], [1], 8, 1)
    remote = link.source.connect(target.descriptor)
    operation = remote.post(rows((source.address, 0, nbytes, 0)))
    operation.wait(None)
    target.wait([0], WAIT_S)
    assert operation.nbytes == nbytes
    assert target.counters()["bytes_arrived"] == nbytes
    assert remote.counters()["bytes_written"] == nbytes
    assert np.array_equal(sink.common[:8192], source.common[:8192])
    assert np.array_equal(sink.own[:8192], source.own[:8192])
    assert np.array_equal(sink.last[:3], source.last[:3])
    assert not sink.last[3:].any()
    with pytest.raises(ConfigError, match="leaves the exported ranges"):
        remote.post(rows((source.address, 1, nbytes, 0)))
    read.release()
    target.close()
    memory.release()
    link.close()
    del part
    source.close()
    sink.close()


def test_b4_lengths_of_4_gib_and_more_do_not_wrap() -> None:
    """There, lengths were cut to 32 bits. The sim reads and writes all of it, window by window."""
    with no_leaks():
        write_5_gib()


def test_b5_a_reused_address_is_registered_anew(link: Link) -> None:
    """There, a cache by address gave back the registration of memory that was gone."""
    target, view, remote = link.connected(16384, [1])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    reserved = mmap.mmap(-1, 16384)
    base = address_of(np.frombuffer(reserved, np.uint8))
    fixed = 0x10
    for generation, length in enumerate((4096, 8192, 100)):
        # Other pages at the same address each time, and more or less of them.
        got = libc.mmap(
            ctypes.c_void_p(base), ctypes.c_size_t(8192), mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1, ctypes.c_long(0),
        )  # fmt: skip
        assert got == base
        np.frombuffer((ctypes.c_uint8 * 8192).from_address(base), np.uint8)[:] = 1 + generation
        lease = link.source.register(base, length)
        remote.post(rows((base, 0, length, 0))).wait(WAIT_S)
        arrive(target, [0])
        assert (view[:length] == 1 + generation).all()
        with pytest.raises(ConfigError, match="no live lease"):
            remote.post(rows((base, 0, length + 1, 0)))
        if link.wire is not None:
            link.wire.run()
            target.flush()
        lease.release()
        with pytest.raises(ConfigError, match="no live lease"):
            remote.post(rows((base, 0, 8, 0)))
        target.reset([0])


def test_b6_nothing_stops_when_nobody_takes_completions(link: Link) -> None:
    """There, bounded queues of commands and completions could wait for each other for ever."""
    count = 1500
    target, view, remote = link.connected(64, [COUNTER])
    payload = link.source_array(random_bytes(64))
    table = rows((address_of(payload), 0, 64, 0))
    kept: list[object] = []

    def write() -> None:
        kept.extend([remote.post(table) for _ in range(count)])

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    target.expect_count(0, 2 * count)  # until here nobody has waited, polled or driven anything
    arrive(target, [0])
    assert np.array_equal(view, payload)
    for operation in kept:
        operation.wait(WAIT_S)  # type: ignore[attr-defined]


def test_b6_no_blocking_call_holds_the_interpreter(case: Case, link: Link) -> None:
    """There, register, send and stop held the GIL while they waited for threads that need it."""
    target, _, remote = link.connected(64, [1, COUNTER])
    target.expect_count(1, 1)
    one, two = groups(link, 2, window=1)
    one.send(1, b"full", WAIT_S)
    blocking = {
        "Target.wait": lambda: target.wait([0], WAIT_S),
        "Target.wait, counter": lambda: target.wait([1], WAIT_S),
        "Target.poll": lambda: target.poll(WAIT_S),
        "PeerGroup.barrier": lambda: one.barrier(WAIT_S),
        "PeerGroup.recv": lambda: one.recv(WAIT_S),
        "PeerGroup.send": lambda: one.send(1, b"more", WAIT_S),
    }
    begun = threading.Barrier(len(blocking) + 1)
    failed: dict[str, BaseException] = {}

    def run(name: str) -> None:
        begun.wait(WAIT_S)
        try:
            blocking[name]()
        except WeightSyncError as error:
            failed[name] = error

    threads = [threading.Thread(target=run, args=(name,)) for name in blocking]
    for thread in threads:
        thread.start()
    begun.wait(WAIT_S)
    time.sleep(0.05)  # all of them wait by now, most likely; if not, the test proves less
    # Any of them with the GIL would keep this thread from what they wait for.
    remote.post(rows((0, 0, 0, 0), (0, 0, 0, 1 << 8))).wait(WAIT_S)
    two.recv(WAIT_S)
    two.send(0, b"", WAIT_S)
    two.barrier(WAIT_S)
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    if case.is_quiet_when_done:
        assert failed == {}


def test_b7_a_fan_out_of_full_queues_overruns_nothing(link: Link) -> None:
    """There, five peers with full queues overran the completion queue, 128 immediates the receives.

    All is posted before anything is waited for, taken or polled.
    """
    peers, chunks = 6, 1100
    made = [link.target(chunks * 8, [chunks], chunk_bits=11) for _ in range(peers)]
    remotes = [link.source.connect(target.descriptor, WAIT_S) for target, _ in made]
    payload = link.source_array(random_bytes(chunks * 8))
    pages = np.arange(chunks)
    operations = [
        remote.write_paged(8, Pages(part, 8, address_of(payload)), Pages(part, 8, 0), int(part[0]))
        for part in np.array_split(pages, 11)
        for remote in remotes
    ]
    for operation in operations:
        operation.wait(WAIT_S)
    for target, view in made:
        arrive(target, [0])
        assert np.array_equal(view, payload)
        assert target.counters()["arrivals"] == chunks
        assert target.counters()["protocol_errors"] == 0


def test_b8_a_peer_that_does_not_answer_is_an_error_in_time_and_only_its_own(link: Link) -> None:
    """There, one lost datagram of the handshake hung a peer for ever, and it counted as ready."""
    target, view = link.target(64, [1])
    gone = target.descriptor
    target.close()
    begin = time.monotonic()
    with pytest.raises((TransferError, MembershipError)):
        link.source.connect(gone, 5.0)
    assert time.monotonic() - begin < 10.0
    # A group knows who is not there yet.
    lonely = link.source.open_group(0, 3)
    with pytest.raises(ConfigError, match="members 1-2 are not connected"):
        lonely.start_barrier()
    # And the engine goes on with others.
    again, view, remote = link.connected(64, [1])
    payload = link.source_array(random_bytes(64))
    remote.post(rows((address_of(payload), 0, 64, 0))).wait(WAIT_S)
    arrive(again, [0])
    assert np.array_equal(view, payload)


def test_immediates_before_anybody_expects_them_are_counted(link: Link) -> None:
    """There, a counter began with zero when it was armed, and what had come was lost."""
    target, _, remote = link.connected(64, [COUNTER, 3])
    remote.post(rows((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1 << 8), (0, 0, 0, 1 << 8 | 2)))
    remote.post(rows((0, 0, 0, 0), (0, 0, 0, 1 << 8 | 1))).wait(WAIT_S)
    target.wait([1], WAIT_S)
    target.expect_count(0, 3)
    target.wait([0], WAIT_S)
    assert sorted(target.poll()) == [0, 1]


def test_an_error_says_that_nothing_of_its_batch_is_in_flight() -> None:
    """There, an error came while siblings on other rails still read the sources."""
    with no_leaks():
        wire = SimWire(2, blocking=False)
        source = open_fabric("sim", wire=wire, name="source")
        sink = open_fabric("sim", wire=wire, name="sink")
        link = Link(source, sink, is_private=True, wire=wire)
        target, view, remote = link.connected(64, [8])
        payload = link.source_array(random_bytes(64))
        wire.set_faults(rails=4, drop=0.4, delay_s=0.1, reorder=True)
        table = rows(*[(address_of(payload) + 8 * i, 8 * i, 8, i) for i in range(8)])
        operation = remote.post(table)
        while not operation.done:
            assert operation.error is None
            assert wire.step()
        assert isinstance(operation.error, RailError)
        assert wire.counts()["dropped"] > 0
        assert wire.num_pending == 0
        before = view.copy()
        payload[:] = 0  # as the error allows
        wire.run()
        assert np.array_equal(view, before)
        wire.freeze("source", rail=1)
        with pytest.raises(TransferTimeoutError):  # and not the error of the rails that go on
            remote.post(table).wait(1.0)
        wire.thaw("source")
        wire.run()
        link.close()
        del link, target, remote, operation, source, sink, wire
