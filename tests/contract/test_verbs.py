"""What only NICs can do: go down in the middle, take a killed peer with them, write for a process
that is stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from support.fabrics import Bytes, address_of, no_leaks, random_bytes, rows
from support.peers import Peer, PeerError
from weightsync.errors import PeerLostError
from weightsync.transport.base import Engine
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.verbs import RdmaPort, rdma_ports, verbs_problem

NBYTES, CHUNKS = 64 << 20, 64
WAIT_S = 40.0
DELAY_MS = 200


def ports(least: int) -> list[RdmaPort]:
    if (problem := verbs_problem()) is not None:
        pytest.skip(f"verbs: {problem}")
    found = [port for port in rdma_ports() if port.is_active]
    if len(found) < least:
        pytest.skip(f"{len(found)} active RDMA ports; this needs {least}")
    return found


def soft_ports(least: int) -> list[RdmaPort]:
    """Ports that may be taken down here: those of Soft-RoCE."""
    found = [port for port in ports(0) if port.device.startswith("rxe")]
    if len(found) < least or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip(f"needs {least} Soft-RoCE ports, root and ip: run it by scripts/soft_roce")
    return found


def set_link(port: RdmaPort, state: str) -> None:
    subprocess.run(["ip", "link", "set", port.interface, state], check=True)


def wait_until(is_so: Callable[[], bool], limit_s: float = WAIT_S) -> None:
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


def wait_until_active(port: RdmaPort) -> None:
    wait_until(lambda: any(one.name == port.name and one.is_active for one in rdma_ports()))


@contextmanager
def delayed(port: RdmaPort) -> Iterator[None]:
    """What the port sends is under way for DELAY_MS."""
    where = ["dev", port.interface, "root"]
    delay = ["netem", "delay", f"{DELAY_MS}ms", "limit", "1000000"]
    subprocess.run(["tc", "qdisc", "replace", *where, *delay], check=True)
    yield
    subprocess.run(["tc", "qdisc", "del", *where], check=True)


def table_of(payload: Bytes) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    each = payload.nbytes // CHUNKS
    at = np.arange(CHUNKS, dtype=np.int64) * each
    columns = [address_of(payload) + at, at, np.full_like(at, each), np.arange(CHUNKS)]
    return np.ascontiguousarray(np.stack(columns, axis=1).astype(np.int64))


def bytes_of(engine: Engine, direction: str) -> list[int]:
    return [rail[f"bytes_{direction}"] for rail in engine.rails()]


def write_while_a_nic_goes_down(found: list[RdmaPort], side: str) -> None:
    names = [port.name for port in found]
    # The second one is on both sides; the victim is on one.
    source = open_fabric("verbs", devices=names[:2])
    sink = open_fabric("verbs", devices=names[1:4])
    payload, arena = random_bytes(NBYTES), np.zeros(NBYTES, np.uint8)
    leases = [
        source.register(address_of(payload), NBYTES, payload),
        sink.register(address_of(arena), NBYTES, arena),
    ]
    target = sink.export([(0, leases[1], 0, NBYTES)], [CHUNKS], 8, 1)
    remote = source.connect(target.descriptor, WAIT_S)
    victim = found[0] if side == "source" else found[3]
    # The same bytes again and again: long enough for a command to run in between.
    operations = [remote.post(table_of(payload)) for _ in range(4)]
    try:
        wait_until(lambda: all(bytes_of(sink, "in")))
        set_link(victim, "down")
        assert not operations[-1].done
        for operation in operations:
            operation.wait(WAIT_S)
        target.wait([0], WAIT_S)
    finally:
        set_link(victim, "up")
        wait_until_active(victim)
    assert np.array_equal(arena, payload)
    remote.close()
    target.close()
    source.close()
    sink.close()


@pytest.mark.parametrize("side", ["source", "sink"])
def test_a_nic_that_goes_down_leaves_its_writes_to_the_others(side: str) -> None:
    found = soft_ports(4)
    with no_leaks():
        write_while_a_nic_goes_down(found, side)


def write_to_a_peer_that_is_killed(found: list[RdmaPort]) -> None:
    source = open_fabric("verbs", devices=[found[0].name])
    payload = random_bytes(NBYTES)
    lease = source.register(address_of(payload), NBYTES, payload)
    with Peer("verbs", devices=[found[1].name]) as sink:
        descriptor = sink.call("export", nbytes=NBYTES, slots=[CHUNKS], is_private=True)
        remote = source.connect(bytes.fromhex(descriptor), WAIT_S)
        operation = remote.post(table_of(payload))
        wait_until(lambda: sum(bytes_of(source, "out")) > 0)
        sink.kill()
        with pytest.raises(PeerLostError):
            operation.wait(WAIT_S)
    lease.release(1.0)  # quiescent
    remote.close()
    source.close()


def test_a_killed_peer_is_a_typed_error_and_leaves_nothing() -> None:
    found = ports(2)
    with no_leaks():
        write_to_a_peer_that_is_killed(found)


def stop_a_writer_inside_a_transfer(found: list[RdmaPort], num_arrived: int) -> None:
    each, chunks = 1 << 20, 16
    sink = open_fabric("verbs", devices=[found[1].name])
    other = open_fabric("verbs", devices=[found[2].name])
    arena, payload = np.zeros(chunks * each, np.uint8), random_bytes(chunks * each, seed=2)
    lease = sink.register(address_of(arena), arena.nbytes, arena)
    other_lease = other.register(address_of(payload), payload.nbytes, payload)
    ranges = [(0, lease, 0, arena.nbytes)]
    target = sink.export(ranges, [chunks], 8, 1)
    table = [[i * each, i * each, each, i] for i in range(chunks)]
    # Patient: an acknowledgement takes longer than the usual timeout.
    with Peer("verbs", devices=[found[0].name], timeout=18) as writer:
        writer.call("connect", descriptor=target.descriptor.hex())
        writer.call("load", nbytes=arena.nbytes, seed=1)
        with delayed(found[0]):
            writer.call("post", table=table)
            wait_until(lambda: len(target.missing(0)) <= chunks - num_arrived)
            writer.stop()
            assert target.missing(0)  # stopped inside
            target.fence()
            # The next version. Only its last chunk comes by a NIC: it must not repair what
            # the old writer spoils.
            arena[:-each] = payload[:-each]
            again = sink.export(ranges, [1], 8, 2)
            remote = other.connect(again.descriptor, WAIT_S)
            last = arena.nbytes - each
            remote.post(rows((address_of(payload) + last, last, each, 0))).wait(WAIT_S)
            again.wait([0], WAIT_S)
            again.flush()
            # Until all has come that was under way, or that the stopped process' NIC sends again.
            time.sleep(5 * DELAY_MS / 1000)
            assert np.array_equal(arena, payload)
        writer.go_on()
        with pytest.raises(PeerError, match="FencedError"):
            writer.call("finish", timeout_s=WAIT_S)
        assert np.array_equal(arena, payload)
        assert again.counters()["arrivals"] == 1
        # The former zombie is welcome to the next version.
        again.reset([0])
        writer.call("connect", descriptor=again.descriptor.hex())
        writer.call("post", table=[[0, 0, arena.nbytes, 0]])
        again.wait([0], WAIT_S)
        writer.call("finish", timeout_s=WAIT_S)
        assert np.array_equal(arena, random_bytes(arena.nbytes, seed=1))
    remote.close()
    again.close()
    target.close()
    lease.release(1.0)
    other_lease.release(1.0)
    sink.close()
    other.close()


@pytest.mark.parametrize("num_arrived", [1, 4])
def test_a_writer_stopped_inside_a_transfer_changes_no_byte_of_the_next_version(
    num_arrived: int,
) -> None:
    """The NIC of a stopped process goes on: what it has been told to send, it sends, and again.

    Here it is told 8 of 16 MiB and holds each packet back for a while, so that there is much of it
    under way when the sink fences.
    """
    found = soft_ports(3)
    with no_leaks():
        stop_a_writer_inside_a_transfer(found, num_arrived)
