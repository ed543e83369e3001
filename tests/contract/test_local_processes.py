"""What only the local fabric does between real processes; test_processes.py has the rest."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from support.fabrics import Handle, address_of, no_leaks, random_bytes, rows
from support.peers import Peer, PeerError
from weightsync.errors import (
    MemoryRegistrationError,
    WeightSyncError,
)
from weightsync.transport.base import Engine
from weightsync.transport.fabrics import open_fabric

WAIT_S = 10.0
# "Bounded": generous, because the machine may be busy; a wait for a stopped peer would never end.
BOUNDED_S = 5.0
MIB = 1 << 20


@pytest.fixture
def engine() -> Iterator[Engine]:
    fds_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with no_leaks():
        handle = Handle(open_fabric("local", name="test"))
        yield cast(Engine, handle)
        handle.close()
    # Other runs on this machine may have files of their own there.
    ours = f"*weightsync*{os.getpid()}*"
    assert list(Path("/dev/shm").glob(ours)) == []
    assert len(os.listdir("/proc/self/fd")) <= fds_before  # noqa: PTH208


def test_a_writer_that_wakes_up_after_the_fence_changes_nothing(engine: Engine) -> None:
    memory = engine.allocate(2 * MIB)
    view = np.frombuffer(memory, np.uint8)
    target = engine.export([(0, memory, 0, 2 * MIB)], [2], 8, 1)
    with Peer() as peer:
        peer.call("connect", descriptor=target.descriptor.hex())
        peer.call("store", offset=0, nbytes=MIB, value=1)
        assert (view[:MIB] == 1).all()
        # Told to write everywhere, and stopped before it does.
        peer.stop()
        peer.start("store", offset=0, nbytes=2 * MIB, value=2)
        start = time.monotonic()
        target.fence()
        assert time.monotonic() - start < BOUNDED_S
        before = view.copy()
        assert (before[:MIB] == 1).all()
        peer.go_on()
        peer.result()  # it has written, into pages that nobody reads
        assert np.array_equal(view, before)
        peer.call("load", nbytes=MIB, seed=1)
        peer.call("post", table=[[0, 0, MIB, 0]])
        with pytest.raises(PeerError, match="FencedError"):
            peer.call("finish", timeout_s=WAIT_S)
        assert np.array_equal(view, before)
        # The same memory under a new generation: the zombie still holds the old pages.
        again = engine.export([(0, memory, 0, 2 * MIB)], [1], 8, 2)
        peer.call("store", offset=0, nbytes=2 * MIB, value=3)
        assert np.array_equal(view, before)
        assert again.missing(0) == [0]
        again.close()


def test_a_discarding_fence_leaves_zeros(engine: Engine) -> None:
    memory = engine.allocate(2 * MIB)
    view = np.frombuffer(memory, np.uint8)
    target = engine.export([(0, memory, 0, 2 * MIB)], [2], 8, 1)
    with Peer() as peer:
        peer.call("connect", descriptor=target.descriptor.hex())
        peer.call("store", offset=0, nbytes=2 * MIB, value=1)
        target.fence(discard=True)
        assert not view.any()
        peer.call("store", offset=0, nbytes=2 * MIB, value=1)
        assert not view.any()


def test_pulling_from_a_stopped_source_goes_on_and_its_fence_does_not_wait(engine: Engine) -> None:
    nbytes = 64 * MIB
    view = np.zeros(nbytes, np.uint8)
    lease = engine.register(address_of(view), nbytes, view)
    target = engine.export([(0, lease, 0, nbytes)], [64, 64], 8, 1)
    with Peer() as peer:
        peer.call("connect", descriptor=target.descriptor.hex())
        peer.call("load", nbytes=nbytes, seed=4)
        table = [[i * MIB, i * MIB, MIB, i] for i in range(64)]
        peer.call("post", table=table)
        peer.stop()
        target.wait([0], WAIT_S)  # a stopped process can be read
        assert np.array_equal(view, random_bytes(nbytes, 4))
        peer.go_on()
        peer.call("finish", timeout_s=WAIT_S)
        view[:] = 0
        peer.call("post", table=[[*row[:3], 256 | row[3]] for row in table])
        start = time.monotonic()
        target.fence()
        assert time.monotonic() - start < BOUNDED_S
        before = view.copy()
        with contextlib.suppress(PeerError):  # done before the fence, or ended by it
            peer.call("finish", timeout_s=WAIT_S)
        peer.call("post", table=table)
        with pytest.raises(PeerError, match="FencedError"):
            peer.call("finish", timeout_s=WAIT_S)
        assert np.array_equal(view, before)
        lease.release()


def test_pulling_goes_on_when_a_stopped_sink_continues(engine: Engine) -> None:
    payload = random_bytes(MIB, seed=6)
    lease = engine.register(address_of(payload), MIB, payload)
    with Peer() as peer:
        descriptor = bytes.fromhex(peer.call("export", nbytes=MIB, slots=[1], is_private=True))
        remote = engine.connect(descriptor, WAIT_S)
        peer.stop()
        # More batches than the channel holds: the others wait at the source.
        operations = [remote.post(rows((address_of(payload), 0, 4096, -1))) for _ in range(300)]
        operations.append(remote.post(rows((address_of(payload), 0, MIB, 0))))
        peer.go_on()
        for operation in operations:
            operation.wait(WAIT_S)
        assert peer.call("holds", nbytes=MIB, seed=6)
        remote.close()
    lease.release()


def test_closing_a_remote_withdraws_what_a_stopped_sink_has_not_read(engine: Engine) -> None:
    payload = random_bytes(MIB, seed=6)
    lease = engine.register(address_of(payload), MIB, payload)
    with Peer() as peer:
        descriptor = bytes.fromhex(peer.call("export", nbytes=MIB, slots=[1], is_private=True))
        remote = engine.connect(descriptor, WAIT_S)
        peer.stop()
        operation = remote.post(rows((address_of(payload), 0, MIB, 0)))
        remote.close()
        with pytest.raises(WeightSyncError, match="closed while"):
            operation.wait(0.0)
        lease.release(0.0)
        peer.go_on()
        with pytest.raises(PeerError, match="TransferTimeoutError"):
            peer.call("wait", slots=[0], timeout_s=0.1)


def test_memory_that_a_source_takes_away_is_a_typed_error(engine: Engine) -> None:
    view = np.zeros(4 * MIB, np.uint8)
    memory = engine.register(address_of(view), view.nbytes, view)
    target = engine.export([(0, memory, 0, view.nbytes)], [1, 1], 8, 1)
    with Peer() as peer:
        peer.call("connect", descriptor=target.descriptor.hex())
        peer.call("load", nbytes=4 * MIB, seed=1)
        peer.call("unmap_payload")
        peer.call("post", table=[[0, 0, 16, 0], [0, 0, 4 * MIB, 256]])
        with pytest.raises(PeerError, match=r"MemoryRegistrationError.*write 1.*EFAULT"):
            peer.call("finish", timeout_s=WAIT_S)
    assert not target.is_complete([1])
    target.close()


def test_a_source_that_cannot_be_read_is_told_when_it_connects() -> None:
    with Peer() as sink, Peer() as source:
        sink.call("drop_capabilities")
        descriptor = sink.call("export", nbytes=MIB, slots=[1], is_private=True)
        source.call("forbid_attaching")
        with pytest.raises(PeerError, match=r"MemoryRegistrationError.*EPERM.*ptrace"):
            source.call("connect", descriptor=descriptor)


def test_too_much_memory_is_a_typed_error(engine: Engine) -> None:
    with pytest.raises(MemoryRegistrationError):
        engine.allocate(1 << 55)
