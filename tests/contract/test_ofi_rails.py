"""The ofi fabric over two rails of which one breaks. Rails are addresses of the loopback device."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from support.fabrics import (
    RAILS,
    Bytes,
    Handle,
    address_of,
    no_leaks,
    ofi_problem,
    random_bytes,
    rows,
)
from weightsync.errors import RailError
from weightsync.transport.base import Engine, Target
from weightsync.transport.fabrics import open_fabric

WAIT_S = 20.0
MIB = 1 << 20
NBYTES = 96 * MIB

pytestmark = pytest.mark.skipif(ofi_problem() is not None, reason=str(ofi_problem()))


@contextlib.contextmanager
def opened(name: str, addresses: tuple[str, ...]) -> Iterator[Engine]:
    handle = Handle(open_fabric("ofi:tcp", name=name, addresses=addresses))
    yield cast(Engine, handle)
    handle.close()


@pytest.fixture
def sink() -> Iterator[Engine]:
    with no_leaks(), opened("sink", RAILS[:2]) as engine:
        yield engine


@pytest.fixture
def source(sink: Engine) -> Iterator[Engine]:
    with opened("source", RAILS[:2]) as engine:
        yield engine


def export(engine: Engine, slots: list[int]) -> tuple[Target, Bytes]:
    memory = engine.allocate(NBYTES)
    return engine.export([(0, memory, 0, NBYTES)], slots, 8, 1), np.frombuffer(memory, np.uint8)


def table_of(payload: Bytes, num_chunks: int = 96) -> npt.NDArray[np.int64]:
    size = payload.nbytes // num_chunks
    return rows(*[(address_of(payload) + i * size, i * size, size, i) for i in range(num_chunks)])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def rail(engine: Engine, index: int) -> dict[str, Any]:
    return engine.rails()[index]


def connections(address: str) -> Iterator[socket.socket]:
    """All TCP connections of this process from an address to itself, as copies."""
    for path in Path("/proc/self/fd").iterdir():
        try:
            number = os.dup(int(path.name))
        except OSError:
            continue  # closed meanwhile
        try:
            copy = socket.socket(fileno=number)
        except OSError:
            os.close(number)  # no socket
            continue
        with copy, contextlib.suppress(OSError):
            if (copy.family, copy.type) != (socket.AF_INET, socket.SOCK_STREAM):
                continue
            if copy.getsockname()[0] == copy.getpeername()[0] == address:
                yield copy


def break_connections(address: str) -> int:
    """Shut them; how many."""
    num_broken = 0
    for connection in connections(address):
        connection.shutdown(socket.SHUT_RDWR)
        num_broken += 1
    return num_broken


def stall_connections(address: str) -> int:
    """Let everything that reaches them be lost, as behind a dead switch; how many."""
    so_attach_filter, drop = 26, struct.pack("=HBBI", 0x06, 0, 0, 0)  # BPF: return 0 bytes
    program = ctypes.create_string_buffer(drop)
    num_stalled = 0
    for connection in connections(address):
        loaded = struct.pack("@HP", 1, ctypes.addressof(program))
        connection.setsockopt(socket.SOL_SOCKET, so_attach_filter, loaded)
        num_stalled += 1
    return num_stalled


def bytes_out(engine: Engine) -> int:
    return sum(one["bytes_out"] for one in engine.rails())


@pytest.mark.parametrize("attempt", range(3))
def test_a_rail_that_breaks_gives_its_work_to_the_other_and_comes_back(
    sink: Engine, source: Engine, attempt: int
) -> None:
    target, view = export(sink, [96])
    payload = random_bytes(NBYTES, attempt)
    lease = source.register(address_of(payload), NBYTES, payload)
    remote = source.connect(target.descriptor, WAIT_S)

    def break_amid_a_post() -> int:
        """How many bytes were sent again."""
        view[:] = 0
        before, of_rail = bytes_out(source), rail(source, 1)["bytes_out"]
        operation = remote.post(table_of(payload))
        # The second rail carries data on its own connections only: the sink is known by the first.
        until(lambda: rail(source, 1)["bytes_out"] > of_rail + (attempt + 1) * 8 * MIB)
        assert break_connections(RAILS[1]) > 0
        operation.wait(WAIT_S)
        target.wait([0], WAIT_S)
        assert np.array_equal(view, payload)
        until(lambda: [one["state"] for one in source.rails()] == ["active", "active"])
        return bytes_out(source) - before - NBYTES

    assert [one["state"] for one in source.rails()] == ["active", "active"]
    # A busy machine may break the rail only after its part is done: once more, then.
    until(lambda: break_amid_a_post() > 0)
    before = rail(source, 1)["bytes_out"]
    view[:] = 0
    remote.post(table_of(payload)).wait(WAIT_S)
    assert np.array_equal(view, payload)
    assert rail(source, 1)["bytes_out"] > before
    remote.close()
    lease.release()
    target.close()


def test_sources_that_had_no_part_in_it_go_on(sink: Engine, source: Engine) -> None:
    target, view = export(sink, [96, 96])
    half = NBYTES // 2
    payload = random_bytes(NBYTES, 9)
    with opened("bystander", RAILS[2:]) as bystander:  # one rail, to both of the sink's
        leases = [
            engine.register(address_of(payload), NBYTES, payload) for engine in (source, bystander)
        ]
        remote = source.connect(target.descriptor, WAIT_S)
        other = bystander.connect(target.descriptor, WAIT_S)
        table = table_of(payload, 192)
        table[96:, 3] = 1 << 8 | np.arange(96)  # the second half is slot 1
        operations = [remote.post(table[:96]), other.post(table[96:])]
        until(lambda: rail(source, 1)["bytes_out"] > 4 * MIB)
        assert break_connections(RAILS[1]) > 0
        states = set()
        while not all(operation.done for operation in operations):
            states.add(rail(bystander, 0)["state"])
            time.sleep(0.001)
        assert [operation.error for operation in operations] == [None, None]
        assert states <= {"active", "fencing"}
        target.wait([0, 1], WAIT_S)
        assert np.array_equal(view[:half], payload[:half])
        assert np.array_equal(view[half:], payload[half:])
        remote.close()
        other.close()
        for lease in leases:
            lease.release()
    target.close()


def lose_the_last_rail() -> None:
    payload = random_bytes(NBYTES, 4)
    with (
        opened("sink", RAILS[1:2]) as sink,
        opened("source", RAILS[1:2]) as source,
        opened("bystander", RAILS[2:]) as bystander,
    ):
        target, view = export(sink, [96, 96])
        leases = [
            engine.register(address_of(payload), NBYTES, payload) for engine in (source, bystander)
        ]
        remotes = [engine.connect(target.descriptor, WAIT_S) for engine in (source, bystander)]
        operation = remotes[0].post(table_of(payload))
        table = table_of(payload)
        table[:, 3] += 1 << 8
        other = remotes[1].post(table)
        until(lambda: rail(source, 0)["bytes_out"] > 8 * MIB)
        assert break_connections(RAILS[1]) > 0  # but not the control connection
        with pytest.raises(RailError, match="no rail to"):
            operation.wait(WAIT_S)
        other.wait(WAIT_S)
        target.wait([1], WAIT_S)
        assert np.array_equal(view, payload)
        for remote in remotes:
            remote.close()
        for lease in leases:
            lease.release()
        target.close()


def test_a_rail_that_stands_still_is_given_up_while_the_other_moves(
    sink: Engine, source: Engine
) -> None:
    target, view = export(sink, [96])
    payload = random_bytes(NBYTES, 5)
    lease = source.register(address_of(payload), NBYTES, payload)
    remote = source.connect(target.descriptor, WAIT_S)
    operation = remote.post(table_of(payload))
    until(lambda: rail(source, 1)["bytes_out"] > 8 * MIB)
    assert not operation.done
    assert stall_connections(RAILS[1]) > 0
    start = time.monotonic()
    operation.wait(WAIT_S)
    # Not at once: what stands still may be slow, and nothing says that it failed.
    assert 1.5 < time.monotonic() - start < WAIT_S
    target.wait([0], WAIT_S)
    assert np.array_equal(view, payload)
    until(lambda: rail(source, 1)["state"] == "active")  # by connections that are not stalled
    remote.close()
    target.close()
    lease.release()


def test_the_last_rail_gone_is_an_error_of_that_source_alone() -> None:
    with no_leaks():
        lose_the_last_rail()
