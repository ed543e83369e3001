"""Every fabric between real processes that are stopped, killed or forge what they send.

What only one fabric does is in test_local_processes.py and test_tcp.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from support import scaled
from support.cuda import is_faked, the_gpu
from support.fabrics import (
    RAILS,
    Bytes,
    Handle,
    address_of,
    fake_gpu_problem,
    no_leaks,
    place_of,
    random_bytes,
    rows,
)
from support.peers import Peer, PeerError
from weightsync.errors import (
    AuthError,
    FencedError,
    PeerLostError,
    TransferTimeoutError,
    WeightSyncError,
)
from weightsync.transport.base import Engine, Lease, Memory, Target
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.verbs import verbs_problem

WAIT_S = 10.0
# "Bounded": generous, because the machine may be busy; a wait for a stopped peer would never end.
BOUNDED_S = 5.0
MIB = 1 << 20


@dataclass(frozen=True)
class Mode:
    """A fabric, and what its sinks receive into."""

    name: str
    fabric: str
    is_private: bool
    needs_sink: bool  # a stopped sink takes nothing
    key_at: Callable[[bytes], int]  # last byte of the key in a descriptor
    options: dict[str, Any] = field(default_factory=dict)

    def open(self, name: str = "test") -> Engine:
        return open_fabric(self.fabric, name=name, **self.options)

    @property
    def place(self) -> Callable[[Bytes], Bytes]:
        return place_of(self.fabric)

    def names(self, peer: Peer) -> str:
        """What messages call that peer."""
        return "127.0.0.1:" if self.fabric == "verbs" else str(peer.pid)

    def peer(self) -> Peer:
        return Peer(self.fabric, **self.options)


def _local_key(descriptor: bytes) -> int:
    return descriptor.index(b"weightsync-") - 2  # before the name's length


def _tcp_key(descriptor: bytes) -> int:
    return 4 + 2 + 1 + len("tcp") + 4 + 8 + 8 + 32 - 1


def _verbs_key(descriptor: bytes) -> int:
    return 4 + 2 + 1 + len("verbs") + 8 + 8 + 32 - 1


MODES = [
    Mode("local-push", "local", False, False, _local_key),
    Mode("local-pull", "local", True, True, _local_key),
    Mode("tcp", "tcp", True, True, _tcp_key),
    Mode("tcp-3-rails", "tcp", False, True, _tcp_key, {"addresses": list(RAILS)}),
]
if fake_gpu_problem() is None:
    MODES.append(Mode("cuda_ipc", "cuda_ipc", True, True, _local_key))
if verbs_problem() is None:
    MODES.append(Mode("verbs", "verbs", True, False, _verbs_key))


@pytest.fixture(params=MODES, ids=lambda mode: mode.name)
def mode(request: pytest.FixtureRequest) -> Mode:
    return cast(Mode, request.param)


@pytest.fixture
def engine(mode: Mode) -> Iterator[Engine]:
    fds_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with no_leaks():
        handle = Handle(mode.open())
        yield cast(Engine, handle)
        handle.close()
    # Other runs on this machine may have files of their own there.
    ours = f"*weightsync*{os.getpid()}*"
    assert list(Path("/dev/shm").glob(ours)) == []
    assert len(os.listdir("/proc/self/fd")) <= fds_before  # noqa: PTH208


def export(engine: Engine, mode: Mode, nbytes: int, slots: list[int]) -> Target:
    view = mode.place(np.zeros(nbytes, np.uint8))
    memory: Lease | Memory = (
        engine.register(address_of(view), nbytes, view)
        if mode.is_private
        else engine.allocate(nbytes)
    )
    return engine.export([(0, memory, 0, nbytes)], slots, 8, 1)


def test_bytes_reach_another_process(engine: Engine, mode: Mode) -> None:
    with mode.peer() as peer:
        descriptor = bytes.fromhex(
            peer.call("export", nbytes=4 * MIB, slots=[4], is_private=mode.is_private)
        )
        payload = mode.place(random_bytes(4 * MIB, seed=9))
        lease = engine.register(address_of(payload), payload.nbytes, payload)
        with engine.connect(descriptor, WAIT_S) as remote:
            assert mode.names(peer) in remote.peer
            table = [(address_of(payload) + i * MIB, i * MIB, MIB, i) for i in range(4)]
            remote.post(rows(*table)).wait(WAIT_S)
            peer.call("wait", slots=[0], timeout_s=WAIT_S)
            assert peer.call("holds", nbytes=4 * MIB, seed=9)
        lease.release()


def test_a_killed_source_is_replaced_by_another(engine: Engine, mode: Mode) -> None:
    target = export(engine, mode, 4 * MIB, [4])
    with mode.peer() as first, mode.peer() as second:
        for peer in (first, second):
            peer.call("connect", descriptor=target.descriptor.hex())
            peer.call("load", nbytes=4 * MIB, seed=2)
        first.call("post", table=[[0, 0, MIB, 0], [MIB, MIB, MIB, 1]])
        first.call("finish", timeout_s=WAIT_S)
        first.kill()
        with pytest.raises(TransferTimeoutError, match="lacks chunks 2-3"):
            target.wait([0], 0.05)
        second.call("post", table=[[i * MIB, i * MIB, MIB, i] for i in range(4)])
        second.call("finish", timeout_s=WAIT_S)
        target.wait([0], WAIT_S)
        assert target.counters()["duplicates"] == 2
    target.close()


@pytest.mark.timeout(scaled(60, 600))
def test_a_source_killed_while_it_writes_harms_nobody(engine: Engine, mode: Mode) -> None:
    for _ in range(scaled(3, 40)):
        nbytes = 64 * MIB
        target = export(engine, mode, nbytes, [64])
        with mode.peer() as peer:
            peer.call("connect", descriptor=target.descriptor.hex())
            peer.call("load", nbytes=nbytes, seed=3)
            peer.start("post", table=[[i * MIB, i * MIB, MIB, i] for i in range(64)])
            while len(target.missing(0)) == 64:
                pass
            peer.kill()
        start = time.monotonic()
        target.fence(discard=True)
        assert time.monotonic() - start < BOUNDED_S
        target.close()


def test_a_killed_sink_fails_operations_in_bounded_time(engine: Engine, mode: Mode) -> None:
    payload = mode.place(random_bytes(MIB))
    lease = engine.register(address_of(payload), MIB, payload)
    with mode.peer() as peer:
        descriptor = bytes.fromhex(
            peer.call("export", nbytes=MIB, slots=[1], is_private=mode.is_private)
        )
        remote = engine.connect(descriptor, WAIT_S)
        table = rows((address_of(payload), 0, MIB, 0))
        remote.post(table).wait(WAIT_S)
        peer.stop()
        in_flight = remote.post(table)
        if mode.needs_sink:  # nobody reads it while the sink is stopped
            with pytest.raises(TransferTimeoutError, match=mode.names(peer)) as slow:
                in_flight.wait(0.05)
            assert slow.value.slots == [0]
            with pytest.raises(TransferTimeoutError, match="still read by 1 operation"):
                lease.release(0.0)
        else:
            in_flight.wait(WAIT_S)  # one-sided: the sink need not run
        peer.kill()
        if mode.needs_sink:
            with pytest.raises(PeerLostError, match="gone") as lost:
                in_flight.wait(BOUNDED_S)
            assert mode.names(peer) in lost.value.peer
        with pytest.raises(PeerLostError):
            remote.post(table).wait(BOUNDED_S)
        remote.close()
        with pytest.raises(PeerLostError, match="does not listen"):
            engine.connect(descriptor, BOUNDED_S)
    lease.release()


def test_idle_processes_use_no_processor(engine: Engine, mode: Mode) -> None:
    target = export(engine, mode, MIB, [1])
    with mode.peer() as peer:
        peer.call("connect", descriptor=target.descriptor.hex())
        peer.call("load", nbytes=MIB, seed=1)
        peer.call("transfer", table=[[0, 0, MIB, 0]], timeout_s=WAIT_S)
        time.sleep(0.3)  # the tick after the last answer
        assert peer.cpu_share(1.0) < 0.01
        peer.call("transfer", table=[[0, 0, MIB, 0]], timeout_s=WAIT_S)  # and it wakes up
    target.close()


def test_a_killed_member_of_a_group_is_named_to_the_others(engine: Engine, mode: Mode) -> None:
    group = engine.open_group(0, 3)
    with mode.peer() as other, mode.peer() as victim:
        peers = {1: other, 2: victim}
        descriptors = {0: group.descriptor.hex()}
        for index, peer in peers.items():
            descriptors[index] = peer.call("join", index=index, size=3)
        for index, descriptor in descriptors.items():
            group.connect(index, bytes.fromhex(descriptor), WAIT_S)
            for peer in peers.values():
                peer.call("meet", member=index, descriptor=descriptor)
        for peer in peers.values():
            peer.start("barrier", timeout_s=WAIT_S)
        group.barrier(WAIT_S)
        for peer in peers.values():
            peer.result()
        victim.kill()
        other.start("barrier", timeout_s=BOUNDED_S)
        with pytest.raises(PeerLostError) as lost:
            group.barrier(BOUNDED_S)
        assert lost.value.member == 2
        with pytest.raises(PeerError, match=r"PeerLostError.*member 2"):
            other.result()
        other.call("tell", member=0, text="still here")  # who lives can be talked to
        assert group.recv(WAIT_S) == (1, b"still here")
    group.close()


def test_connecting_to_a_stopped_sink_times_out(engine: Engine, mode: Mode) -> None:
    with mode.peer() as peer:
        descriptor = bytes.fromhex(
            peer.call("export", nbytes=MIB, slots=[1], is_private=mode.is_private)
        )
        peer.stop()
        with pytest.raises(TransferTimeoutError, match="did not answer"):
            engine.connect(descriptor, 0.1)


def test_a_forged_key_is_refused(engine: Engine, mode: Mode) -> None:
    target = export(engine, mode, MIB, [1])
    descriptor = bytearray(target.descriptor)
    descriptor[mode.key_at(target.descriptor)] ^= 1
    with pytest.raises(AuthError, match="wrong key"):
        engine.connect(bytes(descriptor), WAIT_S)
    assert engine.counters()["refused_connections"] == 1
    target.close()


def test_connections_leave_no_descriptors_behind(engine: Engine, mode: Mode) -> None:
    target = export(engine, mode, MIB, [1])
    source = mode.open("source")
    source.connect(target.descriptor, WAIT_S).close()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(30):
        source.connect(target.descriptor, WAIT_S).close()
    source.close()
    target.fence()
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_a_forked_child_leaves_its_parents_engine_alone(engine: Engine, mode: Mode) -> None:
    memory = engine.allocate(4096)
    target = engine.export([(0, memory, 0, 4096)], [2], 8, 1)
    source = mode.open("source")
    remote = source.connect(target.descriptor, WAIT_S)
    payload = mode.place(random_bytes(4096))
    lease = source.register(address_of(payload), 4096, payload)
    live = the_gpu().live() if is_faked() else 0
    child = os.fork()
    if child == 0:
        status = 1
        try:
            engine.allocate(4096)
        except WeightSyncError:
            remote.close()
            target.close()
            source.close()
            del remote, source, lease, target, memory
            status = 0 if not is_faked() or the_gpu().live() == live else 1
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    # What the child dropped were copies: the parent's memory is registered and connected still.
    remote.post(rows((address_of(payload), 0, 4096, 0))).wait(WAIT_S)
    assert target.missing(0) == [1]
    target.fence()
    with pytest.raises(FencedError):
        remote.post(rows((address_of(payload), 0, 4096, 1))).wait(WAIT_S)
    lease.release()
    remote.close()
    source.close()
