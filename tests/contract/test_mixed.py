"""Fabrics NEAR+FAR: which way a pair of processes goes, one board for both ways, one fence.

The whole contract runs over both ways too (`local+tcp` and, in the long tier, `local+tcp-far`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest

from support.fabrics import Elsewhere, address_of, no_leaks, random_bytes, rows, settle
from weightsync.errors import ConfigError, FencedError, PeerLostError
from weightsync.transport.base import Engine, Remote, Target
from weightsync.transport.fabrics import check_fabric, open_fabric, open_for_job

WAIT_S = 10.0
NBYTES = 1 << 14
FABRIC = "local+tcp"
# Another PID namespace on the same network: its door is found, its memory is not.
NAMESPACE = ["unshare", "--pid", "--fork"]


class Trio:
    """A sink, a source beside it and one that is elsewhere, with the same bytes to send."""

    def __init__(self) -> None:
        self.sink = open_fabric(FABRIC, name="sink")
        self.near = open_fabric(FABRIC, name="near")
        self.far = Elsewhere(open_fabric(FABRIC, name="far"))
        self.payload = random_bytes(NBYTES)
        self.leases = [
            engine.register(address_of(self.payload), NBYTES, self.payload)
            for engine in (self.near, self.far)
        ]
        self.memory = self.sink.allocate(NBYTES)
        self.view = np.frombuffer(self.memory, np.uint8)

    def open(self, generation: int) -> tuple[Target, Remote, Remote]:
        """One slot of two halves, and both sources connected."""
        ranges = [(0, self.memory, 0, NBYTES)]
        target = self.sink.export(ranges, np.array([2], np.int32), 4, generation)
        near = self.near.connect(target.descriptor, WAIT_S)
        return target, near, self.far.connect(target.descriptor, WAIT_S)

    def half(self, number: int) -> np.ndarray:
        """A write of one half."""
        at = number * NBYTES // 2
        return rows((address_of(self.payload) + at, at, NBYTES // 2, number))

    def close(self) -> None:
        del self.view, self.memory, self.leases
        for engine in (self.near, self.far, self.sink):
            engine.close()
        del self.near, self.far, self.sink


@pytest.fixture
def trio() -> Iterator[Trio]:
    with no_leaks():
        made = Trio()
        yield made
        made.close()


def _sent(engine: Engine | Elsewhere) -> int:
    return sum(int(rail["bytes_out"]) for rail in cast(Engine, engine).rails())


def test_the_nic_carries_what_comes_from_elsewhere_alone(trio: Trio) -> None:
    _, near, far = trio.open(1)
    assert near.peer.startswith("local pid ")
    assert far.peer.startswith("tcp ")
    assert near.address is None  # read by the sink: what a fence may not take from a NIC
    near.post(trio.half(0)).wait(WAIT_S)
    assert _sent(trio.near) == 0
    far.post(trio.half(1)).wait(WAIT_S)
    assert _sent(trio.far) >= NBYTES // 2


@pytest.mark.parametrize("first", ["near", "far"])
def test_a_slot_is_complete_whatever_way_its_chunks_came(trio: Trio, first: str) -> None:
    target, near, far = trio.open(1)
    ways = [near, far] if first == "near" else [far, near]
    ways[0].post(trio.half(0)).wait(WAIT_S)
    settle(lambda: target.missing(0) == [1])
    assert target.poll() == []
    ways[1].post(trio.half(0)).wait(WAIT_S)
    settle(lambda: target.counters()["duplicates"] == 1)
    assert target.missing(0) == [1]
    ways[1].post(trio.half(1)).wait(WAIT_S)
    target.wait([0], WAIT_S)
    target.flush()
    assert target.poll() == [0]
    assert np.array_equal(trio.view, trio.payload)
    counters = target.counters()
    assert (counters["arrivals"], counters["duplicates"]) == (2, 1)


def test_a_fence_cuts_off_both_ways(trio: Trio) -> None:
    target, near, far = trio.open(1)
    near.post(trio.half(0)).wait(WAIT_S)
    far.post(trio.half(1)).wait(WAIT_S)
    target.wait([0], WAIT_S)
    target.fence()
    again, new_near, new_far = trio.open(2)
    trio.view[:] = 0
    for old in (near, far):
        with pytest.raises((FencedError, PeerLostError)):
            old.post(trio.half(0)).wait(WAIT_S)
    assert not trio.view.any()
    assert again.missing(0) == [0, 1]
    new_far.post(trio.half(0)).wait(WAIT_S)
    new_near.post(trio.half(1)).wait(WAIT_S)
    again.wait([0], WAIT_S)
    assert np.array_equal(trio.view, trio.payload)


def test_a_sink_that_is_gone_is_lost_by_both_ways(trio: Trio) -> None:
    target, _, _ = trio.open(1)
    descriptor = target.descriptor
    target.close()
    for source in (trio.near, trio.far):
        with pytest.raises((FencedError, PeerLostError)):
            source.connect(descriptor, WAIT_S)


# Says where to knock, and in the end what came.
SINK = f"""
import numpy as np
from weightsync.transport.fabrics import open_fabric
with open_fabric("{FABRIC}") as engine:
    memory = engine.allocate({NBYTES})
    target = engine.export([(0, memory, 0, {NBYTES})], np.array([2], np.int32), 4, 1)
    print(target.descriptor.hex(), flush=True)
    target.wait([0], 20.0)
    target.flush()
    print(bytes(memory).hex(), flush=True)
    input()  # what has arrived is not yet complete at its source
"""


@pytest.mark.parametrize(("prefix", "way"), [([], "local"), (NAMESPACE, "tcp")])
def test_a_process_that_may_not_be_read_goes_the_far_way(
    trio: Trio, prefix: list[str], way: str
) -> None:
    if prefix and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no PID namespaces here: needs unshare, and the right to")
    command = [*prefix, sys.executable, "-c", SINK]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sink:
        assert sink.stdin is not None
        assert sink.stdout is not None
        remote = trio.near.connect(bytes.fromhex(sink.stdout.readline()), WAIT_S)
        assert remote.peer.startswith(f"{way} ")
        for number in range(2):
            remote.post(trio.half(number)).wait(WAIT_S)
        assert bytes.fromhex(sink.stdout.readline()) == trio.payload.tobytes()
        sink.stdin.write("\n")


def test_who_is_reached_by_neither_way_is_named_with_both_reasons(trio: Trio) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SINK], text=True, **pipes) as sink:
        assert sink.stdout is not None
        descriptor = bytes.fromhex(sink.stdout.readline())
        sink.kill()
    with pytest.raises(PeerLostError, match=r"127\.0\.0\.1.*; nor over local: .*pid") as caught:
        trio.near.connect(descriptor, WAIT_S)
    assert not caught.value.where.startswith("mixed.cpp")


def test_both_sides_must_be_of_one_fabric(trio: Trio) -> None:
    target, _, _ = trio.open(1)
    with open_fabric("tcp") as plain, pytest.raises(ConfigError, match=r"'local\+tcp'.*'tcp'"):
        plain.connect(target.descriptor, WAIT_S)


@pytest.mark.parametrize(
    "fabric", ["tcp+local", "local+local", "local+sim", "local+cuda_ipc", "tcp+verbs", "+tcp"]
)
def test_pairs_that_make_no_sense_are_refused(fabric: str) -> None:
    with pytest.raises(ConfigError):
        check_fabric(fabric)


@pytest.mark.parametrize(
    "fabric", ["local+", "local+tcp:1", "local+ofi", "local+ofi:", "ofi", "ofi:", "tcp:1", ""]
)
def test_halves_of_names_are_refused(fabric: str) -> None:
    with pytest.raises(ConfigError):
        check_fabric(fabric)


def test_options_are_those_of_the_far_fabric() -> None:
    with open_for_job(FABRIC, threads=2, options={"addresses": ["127.0.0.1"]}) as engine:
        assert engine.fabric == FABRIC
        assert [rail["address"] for rail in engine.rails()] == ["127.0.0.1"]
    with pytest.raises(ConfigError, match="near_threads=0"):
        open_fabric(FABRIC, near_threads=0)
    with pytest.raises(ConfigError, match="near_threads=2"):
        open_fabric("tcp", near_threads=2)
    for name in ("local+ofi:tcp", "cuda_ipc+verbs"):
        check_fabric(name)
