"""The ofi fabrics between real processes that are stopped inside a transfer, or killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from support.fabrics import Handle, address_of, no_leaks, ofi_problem, random_bytes, rows
from support.peers import Peer, PeerError
from weightsync.errors import ConfigError, PeerLostError
from weightsync.transport.base import Engine
from weightsync.transport.fabrics import open_fabric

WAIT_S = 20.0
BOUNDED_S = 5.0
MIB = 1 << 20

pytestmark = pytest.mark.skipif(ofi_problem() is not None, reason=str(ofi_problem()))


@pytest.fixture(params=["ofi:tcp", "ofi:shm"])
def fabric(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def opened(fabric: str) -> Iterator[Engine]:
    with no_leaks():
        handle = Handle(open_fabric(fabric, name="test"))
        try:
            yield cast(Engine, handle)
        finally:
            handle.close()
    own = f"-{os.getpid()}-"
    assert [path.name for path in Path("/dev/shm").iterdir() if own in path.name] == []


@pytest.fixture
def engine(fabric: str) -> Iterator[Engine]:
    with opened(fabric) as found:
        yield found


IN_A_PROCESS = f"""
import os, sys, traceback
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
import test_ofi_processes as tests
try:
    with tests.opened("ofi:shm") as engine:
        getattr(tests, sys.argv[1])(engine, "ofi:shm", *map(int, sys.argv[2:]))
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
"""


def unless_locked(fabric: str, attempt: Callable[..., None], *arguments: int) -> None:
    """Try again, in another process, where a writer took the provider's lock with it.

    `shm` has locks in memory of both processes. A writer that is killed or frozen while it holds
    one, for a moment of each write, keeps the sink's provider waiting, and a thread of the sink's
    process with it, until that ends (docs/fabrics/ofi.md).
    """
    if fabric != "ofi:shm":
        with opened(fabric) as engine:
            attempt(engine, fabric, *arguments)
        return
    command = [sys.executable, "-c", IN_A_PROCESS, attempt.__name__, *map(str, arguments)]
    for _ in range(3):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as sink:
            try:
                _, said = sink.communicate(timeout=2 * WAIT_S)
            finally:
                sink.kill()
        for path in Path("/dev/shm").glob(f"*-{sink.pid}-*"):
            path.unlink(missing_ok=True)
        if sink.returncode == 0:
            return
        assert "does not answer over shm" in said, said
    pytest.fail(f"a writer took the lock with it in each of three attempts: {said}")


@pytest.mark.parametrize("frozen_at", [0, 5 * MIB, 40 * MIB], ids=["start", "early", "late"])
def test_a_writer_frozen_inside_a_transfer_changes_no_byte_of_the_next_version(
    fabric: str, frozen_at: int
) -> None:
    unless_locked(fabric, freeze_inside, frozen_at)


def freeze_inside(engine: Engine, fabric: str, frozen_at: int) -> None:
    nbytes = 64 * MIB
    memory = engine.allocate(nbytes)
    view = np.frombuffer(memory, np.uint8)
    target = engine.export([(0, memory, 0, nbytes)], [64], 8, 1)
    with Peer(fabric) as peer:
        peer.call("connect", descriptor=target.descriptor.hex())
        peer.call("load", nbytes=nbytes, seed=1)
        # Everything several times, so that the end is far away when it is frozen.
        table = [[i * MIB, i * MIB, MIB, -1] for i in range(64)] * 7
        peer.call("post", table=table + [[i * MIB, i * MIB, MIB, i] for i in range(64)])
        deadline = time.monotonic() + WAIT_S
        while (landed := engine.rails()[0]["bytes_in"]) <= frozen_at:
            assert time.monotonic() < deadline
        peer.stop()
        assert target.missing(0) == list(range(64))  # inside: of the last round nothing is there
        assert 0 < landed < 7 * nbytes
        start = time.monotonic()
        target.fence(discard=True)
        assert time.monotonic() - start < BOUNDED_S
        again = engine.export([(0, memory, 0, nbytes)], [1], 8, 2)
        view[:] = 7  # what the next version has put there
        peer.go_on()
        outcome = ""
        try:
            peer.call("finish", timeout_s=WAIT_S)
        except PeerError as error:
            outcome = str(error)
        assert (view == 7).all()
        assert again.missing(0) == [0]
        assert "FencedError" in outcome
        # The former zombie is welcome to the next version.
        peer.call("connect", descriptor=again.descriptor.hex())
        peer.call("post", table=[[0, 0, nbytes, 0]])
        again.wait([0], WAIT_S)
        peer.call("finish", timeout_s=WAIT_S)
        assert np.array_equal(view, random_bytes(nbytes, seed=1))
        again.close()


def test_a_killed_sink_is_a_lost_peer_and_sources_are_free(engine: Engine, fabric: str) -> None:
    payload = random_bytes(32 * MIB)
    lease = engine.register(address_of(payload), payload.nbytes, payload)
    with Peer(fabric) as peer:
        descriptor = bytes.fromhex(
            peer.call("export", nbytes=payload.nbytes, slots=[1], is_private=False)
        )
        remote = engine.connect(descriptor, WAIT_S)
        peer.stop()
        operations = [
            remote.post(rows((address_of(payload), 0, payload.nbytes, 0))) for _ in range(4)
        ]
        start = time.monotonic()
        peer.kill()
        # Memory of a stopped process can be written, so what was posted first may have succeeded.
        operations.append(remote.post(rows((address_of(payload), 0, 8, 0))))
        while not all(operation.done for operation in operations):
            assert time.monotonic() - start < BOUNDED_S
            time.sleep(0.01)
        errors = [operation.error for operation in operations if operation.error is not None]
        assert {type(error) for error in errors} == {PeerLostError}
        assert str(peer.pid) in str(errors[-1])
        assert time.monotonic() - start < BOUNDED_S
        lease.release()
        with pytest.raises(PeerLostError):
            engine.connect(descriptor, WAIT_S)
        remote.close()


def test_a_killed_source_leaves_a_sink_that_works(fabric: str) -> None:
    unless_locked(fabric, kill_a_source)


def kill_a_source(engine: Engine, fabric: str) -> None:
    nbytes = 32 * MIB
    memory = engine.allocate(nbytes)
    view = np.frombuffer(memory, np.uint8)
    target = engine.export([(0, memory, 0, nbytes)], [1], 8, 1)
    with Peer(fabric) as first:
        first.call("connect", descriptor=target.descriptor.hex())
        first.call("load", nbytes=nbytes, seed=1)
        first.call("post", table=[[0, 0, nbytes, 0]])
        first.kill()
    target.fence(discard=True)
    target = engine.export([(0, memory, 0, nbytes)], [1], 8, 2)
    with Peer(fabric) as second:
        second.call("connect", descriptor=target.descriptor.hex())
        second.call("load", nbytes=nbytes, seed=2)
        second.call("post", table=[[0, 0, nbytes, 0]])
        target.wait([0], WAIT_S)
        assert np.array_equal(view, random_bytes(nbytes, seed=2))
    target.close()


def test_idle_engines_sleep(engine: Engine, fabric: str) -> None:
    memory = engine.allocate(MIB)
    target = engine.export([(0, memory, 0, MIB)], [1], 8, 1)
    with Peer(fabric) as peer:
        peer.call("connect", descriptor=target.descriptor.hex())
        time.sleep(0.3)
        assert peer.cpu_share(1.0) < 0.01
    target.close()


def test_data_stays_on_loopback_unless_the_network_is_trusted() -> None:
    for provider in ("tcp", "verbs;ofi_rxm"):
        with pytest.raises(ConfigError, match="trusted_network"):
            open_fabric(f"ofi:{provider}", addresses=["10.1.2.3"])
    with pytest.raises(ConfigError, match="trusted_network"):
        open_fabric("ofi:efa")
    with pytest.raises(ConfigError, match="fi_getinfo"):
        open_fabric("ofi:nonsense")
