"""What only NICs can do: go down in the middle, and take a killed peer with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from support.fabrics import Bytes, address_of, no_leaks, random_bytes
from weightsync.errors import PeerLostError
from weightsync.transport.base import Engine
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.verbs import RdmaPort, rdma_ports, verbs_problem

NBYTES, CHUNKS = 64 << 20, 64
WAIT_S = 40.0

SINK = """
import sys, time
import numpy as np
from weightsync.transport.fabrics import open_fabric
engine = open_fabric("verbs", devices=[sys.argv[1]])
array = np.zeros(int(sys.argv[2]), np.uint8)
address = array.__array_interface__["data"][0]
lease = engine.register(address, array.nbytes, array)
target = engine.export([(0, lease, 0, array.nbytes)], [int(sys.argv[3])], 8, 1)
print(target.descriptor.hex(), flush=True)
time.sleep(60)
"""


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


def wait_until_active(port: RdmaPort) -> None:
    end = time.monotonic() + WAIT_S
    while not any(one.name == port.name and one.is_active for one in rdma_ports()):
        assert time.monotonic() < end
        time.sleep(0.01)


def table_of(payload: Bytes) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    each = payload.nbytes // CHUNKS
    at = np.arange(CHUNKS, dtype=np.int64) * each
    columns = [address_of(payload) + at, at, np.full_like(at, each), np.arange(CHUNKS)]
    return np.ascontiguousarray(np.stack(columns, axis=1).astype(np.int64))


def bytes_of(engine: Engine, direction: str) -> list[int]:
    return [rail[f"bytes_{direction}"] for rail in engine.rails()]


@pytest.mark.parametrize("side", ["source", "sink"])
def test_a_nic_that_goes_down_leaves_its_writes_to_the_others(side: str) -> None:
    found = soft_ports(5)
    names = [port.name for port in found]
    with no_leaks():
        source = open_fabric("verbs", devices=names[:2])
        sink = open_fabric("verbs", devices=names[2:5])
        payload, arena = random_bytes(NBYTES), np.zeros(NBYTES, np.uint8)
        leases = [
            source.register(address_of(payload), NBYTES, payload),
            sink.register(address_of(arena), NBYTES, arena),
        ]
        target = sink.export([(0, leases[1], 0, NBYTES)], [CHUNKS], 8, 1)
        remote = source.connect(target.descriptor, WAIT_S)
        victim = found[1] if side == "source" else found[3]
        # The same bytes again and again: long enough for a command to run in between.
        operations = [remote.post(table_of(payload)) for _ in range(8)]
        try:
            while sum(bytes_of(source, "out")) < NBYTES // 16:
                time.sleep(0.001)
            set_link(victim, "down")
            assert not operations[-1].done
            for operation in operations:
                operation.wait(WAIT_S)
            target.wait([0], WAIT_S)
        finally:
            set_link(victim, "up")
            wait_until_active(victim)
        assert np.array_equal(arena, payload)
        assert all(bytes_of(sink, "in"))
        remote.close()
        target.close()
        source.close()
        sink.close()
        del operations, operation, remote, target, leases, source, sink


def test_a_killed_peer_is_a_typed_error_and_leaves_nothing() -> None:
    found = ports(2)
    with no_leaks():
        source = open_fabric("verbs", devices=[found[0].name])
        payload = random_bytes(NBYTES)
        lease = source.register(address_of(payload), NBYTES, payload)
        command = [sys.executable, "-c", SINK, found[1].name, str(NBYTES), str(CHUNKS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            remote = source.connect(bytes.fromhex(child.stdout.readline()), WAIT_S)
            operation = remote.post(table_of(payload))
            while sum(bytes_of(source, "out")) == 0:
                time.sleep(0.001)
            child.kill()
            with pytest.raises(PeerLostError):
                operation.wait(WAIT_S)
        lease.release(1.0)  # quiescent
        remote.close()
        source.close()
        del operation, remote, lease, source
